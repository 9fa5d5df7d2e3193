import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_prune.checkpoint.scores import Scores
from lightning_prune.cli import main
from lightning_prune.methods import ShortGPT
from lightning_prune.methods.scores import group_scores, layer_scores
from lightning_prune.models.families import layer_structures
from lightning_prune.models.vocabulary import Block
from lightning_prune.runs.tensorboard import kept_fraction_figure, log_importance
from tests.methods.behaviour import prune, save_model, save_tokens
from tests.tiny import make_tiny


def group_table() -> Scores:
    views = layer_structures(make_tiny())
    generator = torch.Generator().manual_seed(0)
    attention = [10 * torch.rand(2, generator=generator) for _ in views]
    mlp = [torch.rand(40, generator=generator) for _ in views]
    scores = group_scores(views, [{Block.ATTENTION: a, Block.MLP: m} for a, m in zip(attention, mlp, strict=True)])
    return replace(scores, pruned=(scores.layer == 1) & (scores.unit % 4 == 0) | (scores.layer == 3))


def logged(folder: Path, scores: Scores) -> EventAccumulator:
    logger = TensorBoardLogger(folder, name=None, version="")
    log_importance(logger, scores)
    logger.experiment.close()
    return read(folder)


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()


def test_table_in_any_order_with_missing_blocks_equals_a_loop(tmp_path: Path) -> None:
    whole = group_table()
    order = np.random.default_rng(1).permutation(len(whole.layer))
    order = order[~((whole.layer == 2) & whole.of_kind(Block.ATTENTION))[order]]  # a layer without attention
    scores = whole.at(order)
    events = logged(tmp_path, scores)
    names = ("layer", "block", "importance", "score", "pruned")
    rows = list(zip(*(getattr(scores, name).tolist() for name in names), strict=True))
    total = math.fsum(row[2] for row in rows)
    for block in ("attention", "mlp"):
        points = {
            name: {point.step: point.value for point in events.Scalars(f"{name}/{block}")}
            for name in ("importance", "score", "kept fraction")
        }
        for layer in range(4):
            mine = [row for row in rows if row[:2] == (layer, block)]
            if not mine:
                assert all(layer not in values for values in points.values())
                continue
            kept = sum(not row[4] for row in mine) / len(mine)
            assert points["kept fraction"][layer] == pytest.approx(kept, rel=1e-6)
            assert points["importance"][layer] == pytest.approx(math.fsum(row[2] for row in mine) / total, rel=1e-6)
            assert points["score"][layer] == pytest.approx(math.fsum(row[3] for row in mine) / len(mine), rel=1e-6)
    assert [point.step for point in events.Scalars("importance/attention")] == [0, 1, 3]
    assert sum(point.value for point in events.Scalars("importance/layer")) == pytest.approx(1, rel=1e-5)
    assert set(events.Tags()["histograms"]) == {"log10 score/attention", "log10 score/mlp"}
    assert events.Tags()["images"] == ["kept fraction"]


@pytest.mark.parametrize(("importance", "shares"), [([0.1, 0.2, 0.7], [0.1, 0.2, 0.7]), ([0, 0, 0], [0, 0, 0])])
def test_depth_pruning_shares_the_layer_curve(tmp_path: Path, importance: list[float], shares: list[float]) -> None:
    scores = layer_scores(torch.tensor(importance), [50, 50, 50])
    events = logged(tmp_path, replace(scores, pruned=np.array([True, False, False])))
    assert [point.value for point in events.Scalars("importance/layer")] == pytest.approx(shares)
    assert [point.value for point in events.Scalars("kept fraction/layer")] == [0, 1, 1]
    assert kept_fraction_figure(scores).axes[0].get_xlabel() == "layer"


def test_depth_pruning_logs_the_same_layer_curve(tmp_path: Path) -> None:
    method, tokens = ShortGPT(str(save_model(tmp_path / "model")), 0.3), save_tokens(tmp_path / "c.npy")
    run = prune(method, tokens, tmp_path / "logs", evaluate_on=[save_tokens(tmp_path / "e.npy")], logged=True)
    (folder,) = run.folder.glob("*%")  # TensorBoard shows the path, and so the ratio
    events = read(folder)
    assert [point.step for point in events.Scalars("importance/layer")] == [0, 1, 2, 3]
    metrics = json.loads((run.folder / "metrics.json").read_text())
    for tag, value in (
        ("perplexity e.npy", metrics["perplexity"]["e.npy"]["pruned"]),
        ("achieved ratio", metrics["pruning_ratio"]["achieved"]),
    ):
        (point,) = events.Scalars(f"hparams/{tag}")
        assert (point.step, point.value) == (0, pytest.approx(value))


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
    with (run / "scores.csv").open() as file:
        rows = [{k: v if k == "block" else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    total, layers = sum(row["importance"] for row in rows), []
    for layer in range(4):
        values = {"importance/layer": sum(row["importance"] for row in rows if row["layer"] == layer) / total}
        for block in ("attention", "mlp"):
            mine = [row for row in rows if (row["layer"], row["block"]) == (layer, block)]
            values[f"importance/{block}"] = sum(row["importance"] for row in mine) / total
            values[f"score/{block}"] = sum(row["score"] for row in mine) / len(mine)
            values[f"kept fraction/{block}"] = sum(not row["pruned"] for row in mine) / len(mine)
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
    assert {tag for row in rows for tag in row} - {"step"} <= set(events.Tags()["scalars"])
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
        "Lost has not got all results (nobody answers)"
    ]
    assert (tmp_path / "root/wanda/version_0/metrics.json").is_file()


def test_a_logger_that_cannot_be_made_says_why(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([f"{__name__}.NotThere"], [f"{__name__}.NotThere", "--trainer.logger.key", "x"]):
        assert main(["test", *options, "--trainer.logger", *words]) == 2
        (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "--trainer: NotThere cannot be made (Requirement 'tracker>=1' not met)" in message


@pytest.mark.parametrize(
    ("logger", "says"),
    [
        ([f"{__name__}.LoggedOut"], "LoggedOut cannot begin (no key: log in first)"),
        (["CSVLogger", "--trainer.logger.save_dir", "/dev/null/x"], "CSVLogger cannot begin ("),
    ],
)
def test_a_logger_that_cannot_begin_is_one_message_before_anything_is_calibrated(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str], logger: list[str], says: str
) -> None:
    assert fit(options, tmp_path, "--trainer.logger", *logger) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message.startswith(f"error: --trainer.logger: {says}")
    assert not (tmp_path / "root").exists()
