import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_prune.checkpoint.scores import Scores
from lightning_prune.methods.scores import group_scores, layer_scores
from lightning_prune.models.families import layer_structures
from lightning_prune.models.vocabulary import Block
from lightning_prune.runs.tensorboard import kept_fraction_figure, log_importance
from tests.methods.behaviour import SYSTEMS, prune, save_model, save_tokens
from tests.tiny import make_tiny


def group_table() -> Scores:
    views = layer_structures(make_tiny())
    generator = torch.Generator().manual_seed(0)
    attention = [10 * torch.rand(2, generator=generator) for _ in views]
    mlp = [torch.rand(40, generator=generator) for _ in views]
    scores = group_scores(views, [{Block.ATTENTION: a, Block.MLP: m} for a, m in zip(attention, mlp, strict=True)])
    return replace(scores, pruned=(scores.layer == 1) & (scores.unit % 4 == 0) | (scores.layer == 3))


def logged(folder: Path, scores: Scores) -> EventAccumulator:
    with SummaryWriter(str(folder)) as writer:
        log_importance(writer, scores)
    return read(folder)


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()


def test_table_in_any_order_with_missing_blocks_equals_a_loop(tmp_path: Path) -> None:
    whole = group_table()
    order = np.random.default_rng(1).permutation(len(whole.layer))
    order = order[~((whole.layer == 2) & whole.of_kind(Block.ATTENTION))[order]]  # a layer without attention
    scores = Scores(**{field.name: getattr(whole, field.name)[order] for field in fields(whole)})
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


@pytest.mark.parametrize("system", ["wanda", "shortgpt"])
def test_runs_log_the_same_layer_curve(tmp_path: Path, system: str) -> None:
    method = SYSTEMS[system].make(pretrained=str(save_model(tmp_path / "model")), pruning_ratio=0.3)
    run = prune(
        method, save_tokens(tmp_path / "c.npy"), tmp_path / "logs", evaluate_on=[save_tokens(tmp_path / "e.npy")]
    )
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
