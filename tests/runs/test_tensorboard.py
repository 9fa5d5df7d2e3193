import dataclasses
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_prune.methods.scores import Scores, group_scores, layer_scores
from lightning_prune.models.families import anatomy
from lightning_prune.runs.tensorboard import hparams, kept_fraction, kept_fraction_figure, log_importance
from tests.methods.behaviour import SYSTEMS, prune, save_model, save_tokens
from tests.tiny import make_tiny


def group_table() -> Scores:
    views = anatomy(make_tiny())
    generator = torch.Generator().manual_seed(0)
    attention = [10 * torch.rand(2, generator=generator) for _ in views]
    scores = group_scores(views, attention, [torch.rand(40, generator=generator) for _ in views])
    pruned = (scores.layer == 1) & (scores.unit % 4 == 0) | (scores.layer == 3)
    return scores.with_pruned(pruned)


def logged(folder: Path, scores: Scores) -> EventAccumulator:
    with SummaryWriter(str(folder)) as writer:
        log_importance(writer, scores)
    return read(folder)


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    events.Reload()
    return events


def test_step_is_the_layer_and_importances_are_shares(tmp_path: Path) -> None:
    scores = group_table()
    events = logged(tmp_path, scores)
    total = scores.importance.sum()
    sums = 0.0
    for block, number in (("attention", 0), ("mlp", 1)):
        points = events.Scalars(f"importance/{block}")
        assert [point.step for point in points] == [0, 1, 2, 3]
        for point in points:
            inside = (scores.layer == point.step) & (scores.block == number)
            assert point.value == pytest.approx(float(scores.importance[inside].sum() / total), rel=1e-5)
            sums += point.value
    assert sums == pytest.approx(1, rel=1e-5)
    whole = [point.value for point in events.Scalars("importance/layer")]
    assert sum(whole) == pytest.approx(1, rel=1e-5)


def test_kept_fractions_and_scores_are_those_of_the_table(tmp_path: Path) -> None:
    scores = group_table()
    events = logged(tmp_path, scores)
    assert [point.value for point in events.Scalars("kept fraction/attention")] == [1, 0.5, 1, 0]
    assert [point.value for point in events.Scalars("kept fraction/mlp")] == [1, 0.75, 1, 0]
    assert {f"log10 score/{block}" for block in ("attention", "mlp")} == set(events.Tags()["histograms"])
    assert events.Tags()["images"] == ["kept fraction"]
    names, fractions = kept_fraction(scores)
    assert names == ["attention", "mlp"]
    assert fractions.tolist() == [[1, 0.5, 1, 0], [1, 0.75, 1, 0]]


def test_table_in_any_order_with_missing_blocks_equals_a_loop(tmp_path: Path) -> None:
    whole = group_table()
    order = torch.randperm(len(whole.layer), generator=torch.Generator().manual_seed(1))
    order = order[~((whole.layer == 2) & (whole.block == 0))[order]]  # a layer without attention
    columns = {field.name: getattr(whole, field.name)[order] for field in dataclasses.fields(whole)}
    scores = Scores(**columns)
    names, fractions = kept_fraction(scores)
    events = logged(tmp_path, scores)
    rows = list(
        zip(*(columns[name].tolist() for name in ("layer", "block", "importance", "score", "pruned")), strict=True)
    )
    total = math.fsum(row[2] for row in rows)
    for index, block in enumerate(names):
        points = {name: {point.step: point.value for point in events.Scalars(f"{name}/{block}")} for name in
                  ("importance", "score", "kept fraction")}  # fmt: skip
        for layer in range(4):
            mine = [row for row in rows if row[:2] == (layer, index)]
            if not mine:
                assert math.isnan(fractions[index, layer])
                assert all(layer not in values for values in points.values())
                continue
            assert float(fractions[index, layer]) == pytest.approx(sum(not row[4] for row in mine) / len(mine))
            assert points["kept fraction"][layer] == pytest.approx(float(fractions[index, layer]), rel=1e-6)
            assert points["importance"][layer] == pytest.approx(math.fsum(row[2] for row in mine) / total, rel=1e-6)
            assert points["score"][layer] == pytest.approx(math.fsum(row[3] for row in mine) / len(mine), rel=1e-6)
    assert [point.step for point in events.Scalars("importance/attention")] == [0, 1, 3]


def test_depth_pruning_shares_the_layer_curve(tmp_path: Path) -> None:
    scores = layer_scores(torch.tensor([0.1, 0.2, 0.7]), [50, 50, 50])
    events = logged(tmp_path, scores.with_pruned(torch.tensor([True, False, False])))
    assert [point.value for point in events.Scalars("importance/layer")] == pytest.approx([0.1, 0.2, 0.7])
    assert [point.value for point in events.Scalars("kept fraction/layer")] == [0, 1, 1]
    assert kept_fraction_figure(scores).axes[0].get_xlabel() == "layer"


def test_importances_of_zero_are_logged_without_dividing_by_zero(tmp_path: Path) -> None:
    events = logged(tmp_path, layer_scores(torch.zeros(3), [5, 5, 5]))
    assert [point.value for point in events.Scalars("importance/layer")] == [0, 0, 0]


def test_hparams_keep_plain_options_and_final_numbers() -> None:
    metrics = {"pruning_ratio": {"achieved": 0.19}, "perplexity": {"ptb": {"dense": 1.0, "pruned": 2.5, "tokens": 3}}}
    options, results = hparams({"method": "wanda", "pruning_ratio": 0.2, "layers": [1], "none": None}, metrics)
    assert options == {"method": "wanda", "pruning_ratio": 0.2}
    assert results == {"hparams/achieved ratio": 0.19, "hparams/perplexity ptb": 2.5}


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_method_logs_the_same_layer_curve(tmp_path: Path, system: str) -> None:
    model = save_model(tmp_path / "model")
    method = SYSTEMS[system].make(pretrained=str(model), pruning_ratio=0.3)
    run = prune(
        method, save_tokens(tmp_path / "c.npy"), tmp_path / "logs", evaluate_on=[save_tokens(tmp_path / "e.npy")]
    )
    (folder,) = run.folder.glob("*%")  # TensorBoard shows the path, and so the ratio
    events = read(folder)
    assert [point.step for point in events.Scalars("importance/layer")] == [0, 1, 2, 3]
    assert [point.step for point in events.Scalars("hparams/perplexity e.npy")] == [0]
