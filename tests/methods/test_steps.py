"""Iterated selection: what is measured at every step, and what the steps leave."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import lightning_prune
from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.methods import HGSP
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.progress import Progress
from tests.methods.running import mean_token_loss, projections
from tests.tiny import make_tiny, tiny_tokens


def test_every_step_prunes_more_of_what_the_one_before_left(run: Any) -> None:
    method = run(make_tiny(layers=3), HGSP, 0.3, tiny_tokens(16, 16), temperature=0, steps=3, refit="residual")
    steps = [method.run_folder.path / "steps" / name for name in ("0.1", "0.2")]
    plans = [*(PruningPlan.load(step / "plan.json") for step in steps), method.plan]
    group = max(view.unit_cost(Block.ATTENTION) for view in method.layers)
    assert [plan.pruning_ratio for plan in plans] == pytest.approx([0.1, 0.2, 0.3])
    for plan in plans:
        assert plan.achieved_ratio <= plan.pruning_ratio
        at_last_unit = any(1 in (len(one.kept[Block.ATTENTION]), len(one.kept[Block.MLP])) for one in plan.layers)
        dearest = group + (32 if at_last_unit else 0)  # a block's last unit takes the block's norm along
        assert plan.achieved_ratio > plan.pruning_ratio - dearest / plan.parameters["dense"]
        assert plan.weights_updated
    for before, after in itertools.pairwise(plans):
        for earlier, later in zip(before.layers, after.layers, strict=True):
            assert set(later.kept[Block.ATTENTION]) <= set(earlier.kept[Block.ATTENTION])
            assert set(later.kept[Block.MLP]) <= set(earlier.kept[Block.MLP])
    for step, plan in zip(steps, plans, strict=False):
        loaded = lightning_prune.load(step / "pruned")
        assert sum(parameter.numel() for parameter in loaded.parameters()) == plan.parameters["pruned"]


def test_the_second_step_measures_the_model_that_the_first_one_left(run: Any) -> None:
    """The importance of what is kept at last, from gradients of the checkpoint that step one wrote."""
    tokens = tiny_tokens(12, 16)
    method = run(make_tiny(layers=3), HGSP, 0.24, tokens, temperature=0, steps=2, refit="residual")
    step = method.run_folder.path / "steps" / "0.12"
    first, model = PruningPlan.load(step / "plan.json"), lightning_prune.load(step / "pruned").double()
    mean_token_loss(model, tokens).backward()
    for layer in range(3):
        gate, up, down = (projections(model, layer)[name] for name in ("gate_proj", "up_proj", "down_proj"))
        expected = sum((one.weight * one.weight.grad).abs().sum(1) for one in (gate, up))
        expected = expected + (down.weight * down.weight.grad).abs().sum(0)
        rows = method.scores.of(layer, "mlp")
        found = torch.from_numpy(method.scores.importance[rows])[first.layers[layer].kept[Block.MLP]]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-7)


def test_what_is_removed_keeps_what_was_measured_when_it_was(run: Any) -> None:
    model, tokens = make_tiny(layers=3), tiny_tokens(12, 16)
    once = run(model, HGSP, 0.1, tokens, temperature=0)
    twice = run(model, HGSP, 0.2, tokens, temperature=0, steps=2)
    gone = once.scores.pruned
    assert gone.any()
    assert bool(twice.scores.pruned[gone].all())
    torch.testing.assert_close(twice.scores.importance[gone], once.scores.importance[gone])
    assert np.isfinite(twice.scores.score).all()
    assert (once.reusable, twice.reusable) == (True, False)  # whether the scores can be decided on again


def test_progress_is_that_of_all_steps(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[str, float]] = []
    monkeypatch.setattr(Progress, "finish", lambda self, phase, share=1.0: ended.append((phase, share)))
    run(make_tiny(layers=2), HGSP, 0.2, tiny_tokens(8, 16), temperature=0, steps=2, refit="residual")
    phases = [("calibrating", 0.5), ("refitting", 0.5), ("calibrating", 1.0), ("refitting", 1.0)]
    assert [one for one in ended if one[0] in ("calibrating", "refitting")] == phases
