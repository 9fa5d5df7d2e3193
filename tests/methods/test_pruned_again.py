"""A checkpoint with widths per layer is a base model like any other: every method prunes it again."""

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import lightning_prune
from lightning_prune.methods import Wanda
from lightning_prune.models.families import count_parameters
from lightning_prune.models.vocabulary import Block
from tests.cutting import cut
from tests.methods.behaviour import DENSE_SYSTEMS, FAST_DENSE, MEASURES, SYSTEMS, prune, save_tokens
from tests.tiny import make_tiny, tiny_plan, tiny_tokens

RATIO = 0.15
GROUP = 2 * (16 + 8) * 32 + 32  # parameters of the dearest unit: a group, and the norm of its block
# Of five layers of 4 groups and 40 channels: whole, no attention, narrower, no MLP, removed.
KEPT = [
    ([0, 1, 2, 3], list(range(40))),
    ([], list(range(8, 40))),
    ([0, 2, 3], list(range(1, 40, 2))),
    ([1, 2], []),
    ([], []),
]
UNITS = [(4, 40), (0, 32), (3, 20), (2, 0)]


def save_pruned(folder: Path, family: str = "llama") -> PreTrainedModel:
    dense = make_tiny(family, heads=8, kv_heads=4, layers=5)
    cut(dense, tiny_plan(dense, KEPT)).save_pretrained(folder)
    return lightning_prune.load(folder)


@torch.no_grad()
def masked(base: PreTrainedModel, layers: list[Any]) -> torch.Tensor:
    """Logits of the base model with the columns of removed units set to zero, by hand."""
    model = copy.deepcopy(base)
    for layer, kept in zip(model.model.layers, layers, strict=True):
        if kept.removed and hasattr(layer, "layer_scalar"):
            layer.layer_scalar.fill_(1)
        for block, name, units in (
            ("self_attn", "o_proj", kept.kept[Block.ATTENTION]),
            ("mlp", "down_proj", kept.kept[Block.MLP]),
        ):
            linear = getattr(getattr(layer, block), name, None)
            if linear is None:
                assert units == []
                continue
            width = 2 * layer.self_attn.head_dim if name == "o_proj" else 1  # two query heads per group
            stays = [column for unit in units for column in range(unit * width, (unit + 1) * width)]
            gone = sorted(set(range(linear.in_features)) - set(stays))
            linear.weight[:, gone] = 0
            if not units and linear.bias is not None:
                linear.bias.zero_()
    return model(tiny_tokens()).logits


OWN = [name for name in MEASURES if name in DENSE_SYSTEMS]  # where a layer has no attention, or no MLP


@pytest.mark.parametrize(
    ("system", "family"),
    [(system, "llama") for system in (*FAST_DENSE, *OWN)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in product(FAST_DENSE, ("phi3", "gemma3_text", "gemma4_text"))
    ],
)
def test_every_method_prunes_it_again(tmp_path: Path, system: str, family: str) -> None:
    base = save_pruned(tmp_path / "pruned", family)
    tokens = save_tokens(tmp_path / "calibration.npy")
    run = prune(
        SYSTEMS[system].make(pretrained=str(tmp_path / "pruned"), pruning_ratio=RATIO), tokens, tmp_path / "runs"
    )
    pruned = lightning_prune.load(run.pruned)
    plan, left = run.method.plan, count_parameters(pruned)
    total = count_parameters(base)
    assert plan.parameters == {"dense": total, "pruned": left}
    assert [layer.layer for layer in plan.layers] == [0, 1, 2, 3]
    for layer, (groups, channels) in zip(plan.layers, UNITS, strict=True):  # of the widths that are there
        assert set(layer.kept[Block.ATTENTION]) <= set(range(groups))
        assert set(layer.kept[Block.MLP]) <= set(range(channels))
    if SYSTEMS[system].removes == "groups":
        assert len(run.method.scores.unit) == sum(map(sum, UNITS))
        dearest = GROUP * max(own.head_dim for own in base.config.per_layer_config) // 8
        assert RATIO * total - dearest < total - left <= RATIO * total
    if not plan.weights_updated:
        with torch.no_grad():
            torch.testing.assert_close(pruned(tiny_tokens()).logits, masked(base, plan.layers), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"allocation": "uniform"}, {"steps": 2, "refit": "output"}], ids=["uniform", "steps"]
)
def test_options_of_the_selection(tmp_path: Path, options: dict[str, Any]) -> None:
    base = save_pruned(tmp_path / "pruned")
    tokens = save_tokens(tmp_path / "calibration.npy")
    run = prune(Wanda(str(tmp_path / "pruned"), RATIO, **options), tokens, tmp_path / "runs")
    total, left = count_parameters(base), count_parameters(lightning_prune.load(run.pruned))
    assert RATIO * total - 4 * GROUP < total - left <= RATIO * total
    if "allocation" in options:  # every layer loses about the same share
        for layer, (groups, channels) in zip(run.method.plan.layers, UNITS, strict=True):
            lost = groups + channels - len(layer.kept[Block.ATTENTION]) - len(layer.kept[Block.MLP])
            assert lost > 0 or not channels  # a group is more than the share of a layer of two
