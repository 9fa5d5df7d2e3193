"""What a run shows in its loggers is what its files say."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_prune.checkpoint.scores import Scores
from lightning_prune.cli import main
from lightning_prune.methods.scores import group_scores, layer_scores
from lightning_prune.models.families import layer_structures
from lightning_prune.models.vocabulary import Block
from lightning_prune.runs.tensorboard import log_importance
from tests.methods.behaviour import save_model, save_tokens
from tests.tiny import make_tiny


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()


def logged(folder: Path, scores: Scores) -> EventAccumulator:
    logger = TensorBoardLogger(folder, name=None, version="")
    log_importance(logger, scores)
    logger.experiment.close()
    return read(folder)


def test_rows_in_any_order_with_a_missing_block_show_the_same_of_the_others(tmp_path: Path) -> None:
    views = layer_structures(make_tiny())
    generator = torch.Generator().manual_seed(0)
    blocks = ((Block.ATTENTION, 2), (Block.MLP, 40))
    whole = group_scores(views, [{block: torch.rand(n, generator=generator) for block, n in blocks} for _ in views])
    whole = replace(whole, pruned=(whole.layer == 1) & (whole.unit % 4 == 0) | (whole.layer == 3))
    order = np.random.default_rng(1).permutation(len(whole.layer))
    part = whole.at(order[~((whole.layer == 2) & whole.of_kind(Block.ATTENTION))[order]])
    before, after = logged(tmp_path / "whole", whole), logged(tmp_path / "part", part)
    scale = whole.importance.sum() / part.importance.sum()  # shares are of all importance
    for block, layers in (("attention", [0, 1, 3]), ("mlp", [0, 1, 2, 3])):
        for name, factor in (("importance", scale), ("score", 1), ("kept fraction", 1)):
            values = {point.step: factor * point.value for point in before.Scalars(f"{name}/{block}")}
            points = after.Scalars(f"{name}/{block}")
            assert [point.step for point in points] == layers
            assert [point.value for point in points] == pytest.approx([values[layer] for layer in layers], rel=1e-6)
    assert sum(point.value for point in after.Scalars("importance/layer")) == pytest.approx(1, rel=1e-5)
    assert set(after.Tags()["histograms"]) == {"log10 score/attention", "log10 score/mlp"}
    assert after.Tags()["images"] == ["kept fraction"]


@pytest.mark.parametrize("importance", [[0.1, 0.2, 0.7], [0, 0, 0]])
def test_depth_pruning_shares_the_layer_curve(tmp_path: Path, importance: list[float]) -> None:
    scores = layer_scores(torch.tensor(importance), [50, 50, 50])
    events = logged(tmp_path, replace(scores, pruned=np.array([True, False, False])))
    assert [point.value for point in events.Scalars("importance/layer")] == pytest.approx(importance)
    assert [point.value for point in events.Scalars("kept fraction/layer")] == [0, 1, 1]


class Recorder(Logger):
    """The smallest logger there can be: no ``experiment``, no folder."""

    name, version = "recorder", 0
    rows: list[tuple[dict[str, float], int | None]] = []  # noqa: RUF012 - of the last run
    options: dict[str, Any] = {}  # noqa: RUF012
    ended: list[str] = []  # noqa: RUF012

    def __init__(self) -> None:
        Recorder.rows, Recorder.options, Recorder.ended = [], {}, []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((dict(metrics), step))

    def log_hyperparams(self, params: Any) -> None:
        self.options.update(params)

    def finalize(self, status: str) -> None:
        self.ended.append(status)


class Pictures(Recorder):
    """One that also takes pictures, as W&B's does."""

    pictures: dict[str, Any] = {}  # noqa: RUF012

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.pictures[key] = images


class Lost(Recorder):
    """One whose server is gone when the run has ended."""

    def log_hyperparams(self, params: Any) -> None:
        raise ConnectionError("nobody answers\nat all")


class LoggedOut(Recorder):
    @property
    def experiment(self) -> None:
        raise PermissionError("no key: log in first")


class NotThere(Recorder):
    def __init__(self, key: str = "") -> None:
        raise ModuleNotFoundError("Requirement 'tracker>=1' not met")


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    words = ["--model.pretrained", str(save_model(tmp_path / "model")), "--trainer.accelerator", "cpu"]
    words += ["--data.eval_datasets", f"[{save_tokens(tmp_path / 'e.npy')}]", "--trainer.enable_progress_bar", "false"]
    return [*words, "--trainer.default_root_dir", str(tmp_path / "root")]


def fit(options: list[str], folder: Path, *loggers: str) -> int:
    words = ["--config", "wanda", "--data.dataset", str(save_tokens(folder / "c.npy"))]
    return main(["fit", *words, *options, *loggers])


def expected(run: Path) -> tuple[list[dict[str, float]], dict[str, float]]:
    """What the files of a run say of every layer, and of the whole."""
    table, layers = pd.read_csv(run / "scores.csv"), []
    total = table["importance"].sum()
    for _, rows in table.groupby("layer"):
        values = {"importance/layer": rows["importance"].sum() / total}
        for block, mine in rows.groupby("block"):
            values[f"importance/{block}"] = mine["importance"].sum() / total
            values[f"score/{block}"] = mine["score"].mean()
            values[f"kept fraction/{block}"] = 1 - mine["pruned"].mean()
        layers.append(values)
    metrics = json.loads((run / "metrics.json").read_text())
    final = {"hparams/achieved ratio": metrics["pruning_ratio"]["achieved"]}
    distance = metrics["distance"]["e.npy"]
    final |= {f"hparams/{key.replace('_', ' ')} e.npy": value for key, value in distance.items()}
    return layers, final | {"hparams/perplexity e.npy": metrics["perplexity"]["e.npy"]["pruned"]}


def test_every_logger_gets_a_row_per_layer_the_final_numbers_and_the_options(
    tmp_path: Path, options: list[str]
) -> None:
    """A file, TensorBoard, and one with a place for pictures and without an ``experiment``."""
    several = ["--trainer.logger+=CSVLogger", f"--trainer.logger.save_dir={tmp_path}/csv"]
    several += ["--trainer.logger+=TensorBoardLogger", f"--trainer.logger.save_dir={tmp_path}/events"]
    assert fit(options, tmp_path, *several, f"--trainer.logger+={__name__}.Pictures") == 0
    folder, chosen = tmp_path / "csv/lightning_logs/version_0", {"method": "wanda", "pruning_ratio": 0.2}
    assert yaml.safe_load((folder / "hparams.yaml").read_text()) == Recorder.options == chosen
    with (folder / "metrics.csv").open() as file:
        rows = [{tag: float(value) for tag, value in row.items() if value} for row in csv.DictReader(file)]
    layers, final = expected(tmp_path / "root/wanda/version_0")
    for number, (row, values, (found, step)) in enumerate(zip(rows, [*layers, final], Recorder.rows, strict=True)):
        assert row == pytest.approx(values | {"step": number % 4}, rel=1e-6)
        assert (found, step) == (pytest.approx(values, rel=1e-6), number % 4)
    events = read(tmp_path / "events/lightning_logs/version_0")
    for tag in {tag for row in (*layers, final) for tag in row}:
        values = [row[tag] for row in (*layers, final) if tag in row]
        points = [(point.step, pytest.approx(point.value, rel=1e-6)) for point in events.Scalars(tag)]
        assert points == list(enumerate(values))
    assert Recorder.ended[-1] == "success"
    ((key, (picture,)),) = Pictures.pictures.items()
    assert key == "kept fraction"
    assert (picture.dtype, picture.shape[2]) == (np.uint8, 3)
    assert picture.min() < 50 < 200 < picture.max()  # something was drawn


def test_an_evaluation_is_logged_too(tmp_path: Path, options: list[str]) -> None:
    assert main(["test", *options, "--trainer.logger", f"{__name__}.Recorder"]) == 0
    metrics = json.loads((tmp_path / "root/test/version_0/metrics.json").read_text())
    assert Recorder.rows == [({"hparams/perplexity e.npy": metrics["perplexity"]["e.npy"]["perplexity"]}, 0)]
    assert Recorder.options == {"model": f"{tmp_path}/model"}


def test_a_logger_that_fails_at_the_end_costs_no_run(
    tmp_path: Path, options: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    assert fit(options, tmp_path, "--trainer.logger", f"{__name__}.Lost") == 0
    assert [str(one.message) for one in recwarn if "Lost" in str(one.message)] == [
        "Lost did not receive all results (nobody answers)."
    ]
    assert (tmp_path / "root/wanda/version_0/metrics.json").is_file()


@pytest.mark.parametrize(
    ("logger", "says"),
    [
        ([f"{__name__}.NotThere"], "--trainer: NotThere cannot be made (Requirement 'tracker>=1' not met)"),
        ([f"{__name__}.NotThere", "--trainer.logger.key", "x"], "--trainer: NotThere cannot be made (Requirement "),
        ([f"{__name__}.LoggedOut"], "--trainer.logger: LoggedOut cannot begin (no key: log in first)"),
        (["CSVLogger", "--trainer.logger.save_dir", "/dev/null/x"], "--trainer.logger: CSVLogger cannot begin ("),
    ],
)
def test_a_logger_that_cannot_be_made_or_begin_is_one_message_before_anything_is_calibrated(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str], logger: list[str], says: str
) -> None:
    assert fit(options, tmp_path, "--trainer.logger", *logger) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message.startswith(f"error: {says}")
    assert not (tmp_path / "root").exists()
