"""Iterated selection: what is measured at every step, and what the steps leave."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_prune
from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.methods import HGSP
from lightning_prune.models.vocabulary import Block
from tests.methods.running import mean_token_loss, projections, run_method, save_base
from tests.tiny import make_tiny, tiny_tokens


def test_every_step_prunes_more_of_what_the_one_before_left(tmp_path: Path) -> None:
    base = save_base(make_tiny(layers=3), tmp_path / "base")
    method = HGSP(base, 0.3, temperature=0, steps=3, refit="residual")
    run_method(method, tiny_tokens(16, 16), tmp_path / "run")
    plans = [PruningPlan.load(tmp_path / "run" / "steps" / name / "plan.json") for name in ("0.1", "0.2")]
    plans.append(method.plan)
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
    for name, plan in zip(("0.1", "0.2"), plans, strict=False):
        loaded = lightning_prune.load(tmp_path / "run" / "steps" / name / "pruned")
        assert sum(parameter.numel() for parameter in loaded.parameters()) == plan.parameters["pruned"]


def test_the_second_step_measures_the_model_that_the_first_one_left(tmp_path: Path) -> None:
    """The importance of what is kept at last, from gradients of the checkpoint that step one wrote."""
    tokens = tiny_tokens(12, 16)
    base = save_base(make_tiny(layers=3), tmp_path / "base")
    method = run_method(HGSP(base, 0.24, temperature=0, steps=2, refit="residual"), tokens, tmp_path / "run")
    first = PruningPlan.load(tmp_path / "run" / "steps" / "0.12" / "plan.json")
    model = lightning_prune.load(tmp_path / "run" / "steps" / "0.12" / "pruned").double()
    mean_token_loss(model, tokens).backward()
    for layer in range(3):
        down = projections(model, layer)["down_proj"]
        gate, up = projections(model, layer)["gate_proj"], projections(model, layer)["up_proj"]
        expected = sum((one.weight * one.weight.grad).abs().sum(1) for one in (gate, up))
        expected = expected + (down.weight * down.weight.grad).abs().sum(0)
        rows = method.scores.of(layer, "mlp")
        found = torch.from_numpy(method.scores.importance[rows])[first.layers[layer].kept[Block.MLP]]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-7)


def test_what_went_keeps_what_was_measured_when_it_went(tmp_path: Path) -> None:
    base = save_base(make_tiny(layers=3), tmp_path / "base")
    tokens = tiny_tokens(12, 16)
    once = run_method(HGSP(base, 0.1, temperature=0), tokens, tmp_path / "once")
    twice = run_method(HGSP(base, 0.2, temperature=0, steps=2), tokens, tmp_path / "twice")
    gone = once.scores.pruned
    assert gone.any()
    assert bool(twice.scores.pruned[gone].all())
    torch.testing.assert_close(twice.scores.importance[gone], once.scores.importance[gone])
    assert np.isfinite(twice.scores.score).all()


def test_steps_cannot_be_decided_again() -> None:
    assert not HGSP("demo", 0.2, steps=2).reusable
    assert HGSP("demo", 0.2).reusable
