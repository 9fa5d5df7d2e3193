"""Experts and channels are pruned equally in every group, lowest first, against loops."""

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lightning_prune.checkpoint.expert_plans import check_experts
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.checkpoint.scores import BLOCKS, Scores
from lightning_prune.methods import REAP, Magnitude
from lightning_prune.methods.expert_selection import select_experts
from lightning_prune.methods.group_pruning import kept_units
from lightning_prune.methods.scores import group_scores
from lightning_prune.methods.selection import Budget
from lightning_prune.models.families import layer_structures
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from tests.tiny import make_moe

LAYERS, GROUPS = 3, 4  # four experts of 24 channels, or four groups of a router with 24 experts each


def table(block: Block, units: int = 24, cost: int = 10, attention: int = 0) -> Scores:
    rows = [
        (layer, kind, unit, price)
        for layer in range(LAYERS)
        for kind, count, price in ((Block.ATTENTION, attention, 35), (block, GROUPS * units, cost))
        for unit in range(count)
    ]
    layer, kind, unit, price = (np.array(column) for column in zip(*rows, strict=True))
    value = np.random.default_rng(0).random(len(rows)) + 0.5 * layer
    code = np.array([BLOCKS.index(Block(one)) for one in kind])
    none = np.zeros(len(rows), dtype=bool)
    return Scores(layer, code, unit, value * price, price, np.ones(len(rows)), value, none, value)


def budget_of(scores: Scores, ratio: float) -> Budget:
    return Budget(int(scores.cost.sum()), ratio, {})


def by_group(scores: Scores, units: int = 24) -> dict[tuple[int, int], list[int]]:
    found: Any = defaultdict(list)
    for row in np.flatnonzero(scores.code != BLOCKS.index(Block.ATTENTION)).tolist():
        found[int(scores.layer[row]), int(scores.unit[row]) // units].append(row)
    return dict(found)


@pytest.mark.parametrize("block", [Block.EXPERT, Block.EXPERT_CHANNEL])
@pytest.mark.parametrize(("multiple", "ratio", "each"), [(1, 0.3, 7), (8, 0.3, 0), (8, 0.4, 8), (10, 0.2, 4)])
def test_every_group_loses_its_lowest_units_equally_many_and_never_too_many(
    block: Block, multiple: int, ratio: float, each: int
) -> None:
    scores = table(block)
    free = np.ones(len(scores.cost), dtype=bool)
    options: dict[str, Any] = {"allocation": "global", "groups": GROUPS, "keep": 2, "multiple": multiple}
    if not each:
        with pytest.raises(UserError, match=r"smallest step: .* is 0\.3334 of all"):
            select_experts(scores, free, budget_of(scores, ratio), **options)
        assert select_experts(scores, free, budget_of(scores, 0.3334), **options).any()
        return
    pruned = select_experts(scores, free, budget_of(scores, ratio), **options)
    for rows in by_group(scores).values():
        lowest = sorted(rows, key=lambda row: scores.score[row])[:each]
        assert set(np.flatnonzero(pruned)) & set(rows) == set(lowest)


@pytest.mark.parametrize(("cost", "step"), [(10, "0.3334"), (1000, "0.333334")])
def test_the_ratio_of_the_only_step_is_enough_and_not_too_much(cost: int, step: str) -> None:
    scores, free = table(Block.EXPERT, cost=cost), np.ones(GROUPS * LAYERS * 24, dtype=bool)
    options: dict[str, Any] = {"allocation": "global", "groups": GROUPS, "keep": 16, "multiple": 8}
    with pytest.raises(UserError, match=rf"smallest step: .* is {step} of all .* Give at least that"):
        select_experts(scores, free, budget_of(scores, 0.2), **options)
    assert select_experts(scores, free, budget_of(scores, float(step)), **options).sum() == GROUPS * LAYERS * 8


def test_what_must_be_kept_is_kept_and_more_is_refused() -> None:
    scores, options = table(Block.EXPERT), {"allocation": "global", "groups": GROUPS, "multiple": 1}
    free = np.ones(len(scores.cost), dtype=bool)
    pruned = select_experts(scores, free, budget_of(scores, 0.91), keep=2, **options)
    assert {int((~pruned[rows]).sum()) for rows in by_group(scores).values()} == {3}
    with pytest.raises(UserError, match=r"largest reachable ratio is 0\.7500"):
        select_experts(scores, free, budget_of(scores, 0.91), keep=6, **options)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_groups_of_attention_are_ranked_among_bundles(allocation: Any) -> None:
    scores = table(Block.EXPERT_CHANNEL, attention=6)
    scores.score[(scores.code == 0) & (scores.layer == 0)] = -1.0  # all of layer 0 are worth least
    free = np.ones(len(scores.cost), dtype=bool)
    budget = budget_of(scores, 0.4)
    pruned = select_experts(scores, free, budget, allocation, GROUPS, 1, 1)
    assert 0 <= budget.parameters - scores.cost[pruned].sum() < GROUPS * LAYERS * 10
    attention = Counter(scores.layer[pruned & (scores.code == 0)].tolist())
    assert attention[0] == 6 if allocation == "global" else set(attention.values()) == {2}
    assert len({int(pruned[rows].sum()) for rows in by_group(scores).values()}) == 1


def test_experts_that_are_no_candidates_stay() -> None:
    scores = table(Block.EXPERT, attention=6)
    free = scores.code == 0
    pruned = select_experts(scores, free, budget_of(scores, 0.02), "global", GROUPS, 2, 1)
    assert pruned.any()
    assert not (pruned & ~free).any()


@pytest.mark.parametrize(("units", "ratio"), [("all", 0.25), ("all", 0.5), ("expert_channel", 0.2), ("expert", 0.2)])
def test_multiples_hold_in_experts_and_around_them_or_it_says_so(units: Any, ratio: float) -> None:
    """Widths that are no multiple: 36 of the experts and 45 of the MLP in the first layer."""
    options = {"kv_heads": 4, "heads": 8, "channels": 45, "layers": 3}
    model = make_moe("qwen2_moe", width=36, **options, mlp_only_layers=[0])
    method = Magnitude(units=units, round_to=16, groups_multiple_of=2, pruning_ratio=ratio)
    views = method.arranged(layer_structures(model))
    scores = group_scores(views, kinds=method.kinds(views))
    pruned = method.select(scores, views, sum(view.cost for view in views))
    kept = kept_units(replace(scores, pruned=pruned), views)
    groups = {len(layer.kept[Block.ATTENTION]) for layer in kept}
    assert all(count % 2 == 0 for count in groups)
    said = method.selection.unrounded(replace(scores, pruned=pruned), views)
    if units == "all":
        assert {len(layer.kept[Block.EXPERT_CHANNEL]) // views[1].experts.total % 16 for layer in kept[1:]} == {0}
        assert len(kept[0].kept[Block.MLP]) % 16 == 0
        assert not said
    else:
        assert "0 (45)" in said
        assert ("1 (36), 2 (36)" in said) == (units == "expert")


@pytest.mark.parametrize(
    ("units", "kept", "message"),
    [
        (
            Block.EXPERT,
            [[0], [0]],
            r"layer 0 keeps 1 experts; its router chooses 2 for every token, so at least 2 must",
        ),
        (Block.EXPERT, [[0, 1, 2], [0, 1]], "layers keep different numbers of experts"),
        (Block.EXPERT_CHANNEL, [range(47), range(48)], "layer 0 keeps 11 to 12 expert_channel units of its experts"),
        (Block.EXPERT_CHANNEL, [range(0, 48, 2), range(48)], "of channels inside them"),
    ],
)
def test_a_plan_keeps_equally_many_and_no_fewer_experts_than_the_router_chooses(
    units: Block, kept: Any, message: str
) -> None:
    views = [view.with_experts_as(units) for view in layer_structures(make_moe(num_experts=4, layers=2))]
    plans = [LayerPlan(view.index, {units: list(one)}) for view, one in zip(views, kept, strict=True)]
    with pytest.raises(UserError, match=message):
        check_experts(views, plans)


def test_the_largest_ratio_that_leaves_the_experts_a_router_chooses_is_named() -> None:
    method = REAP(pruning_ratio=0.7)
    views = method.arranged(layer_structures(make_moe(layers=2)))
    total = sum(view.cost for view in views)
    largest = 6 * sum(view.unit_cost(Block.EXPERT) for view in views) / total  # of eight, two are kept
    with pytest.raises(UserError, match=rf"largest reachable ratio is {int(largest * 1e4) / 1e4:.4f}"):
        method.select(group_scores(views, kinds=method.kinds(views)), views, total)


def test_a_ratio_that_takes_a_super_expert_is_refused() -> None:
    method = REAP(pruning_ratio=0.5)
    views = method.arranged(layer_structures(make_moe(layers=2)))
    scores = group_scores(views, kinds=method.kinds(views))
    marked = replace(scores, super_expert=np.ones(len(scores.layer), dtype=bool))
    with pytest.raises(
        UserError,
        match=r"at 0\.5 layer 0 loses expert 0, whose output peaks above all others. .* --model.super_experts remove",
    ):
        method.select(marked, views, sum(view.cost for view in views))
