"""The table of scores, and the selection against a plain loop over the units, which shares no code with it."""

import random
import re
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_prune.checkpoint.scores import BLOCKS, Flags, Scores
from lightning_prune.methods.group_pruning import kept_units
from lightning_prune.methods.scores import group_scores, layer_scores
from lightning_prune.methods.selection import (
    Budget,
    GroupSelection,
    protect_best,
    ranking,
    select_global,
    select_uniform,
)
from lightning_prune.models.families import layer_structures
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from tests.methods.reference import Row, UnreachableError, lowest_of_each, prefix, ranked, unprotected
from tests.tiny import make_tiny

GROUP, CHANNEL = 0, 1  # blocks in ``Row``


def table(rows: list[Row]) -> Scores:
    layer, code, unit, cost = (
        np.array([getattr(row, name) for row in rows]) for name in ("layer", "block", "unit", "cost")
    )
    base, score = (np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in ("base", "score"))
    none = np.zeros(len(rows), dtype=bool)
    return Scores(layer, code, unit, base * cost, cost, np.ones(len(rows)), score, none, base)


def budget_of(total: int, ratio: float, overhead: dict[tuple[int, int], int], round_to: int = 1) -> Budget:
    return Budget(total, ratio, {(layer, BLOCKS[block]): cost for (layer, block), cost in overhead.items()}, round_to)


def random_rows(draw: random.Random) -> list[Row]:
    """Up to five layers; ties everywhere, some layers without any prior; one time in three not in table order."""
    layers, groups, channels = draw.randint(1, 5), draw.randint(1, 4), draw.randint(1, 20)
    cost = (draw.randint(1, 60), draw.randint(1, 9))
    levels = draw.choice([1, 3, 10, 1000])
    blocks = [(layer, block) for layer in range(layers) for block in (GROUP, CHANNEL)]
    prior = {key: draw.choice([0.0, 0.5, 1.0, draw.random()]) for key in blocks}
    units = [(*key, unit) for key in blocks for unit in range((groups, channels)[key[1]])]
    if draw.random() < 1 / 3:
        draw.shuffle(units)
    rows = []
    for place, (layer, block, unit) in enumerate(units):
        base = float(draw.randrange(levels))
        rows.append(Row(place, layer, block, unit, cost[block], base, base * prior[layer, block]))
    return rows


def random_overhead(draw: random.Random, rows: list[Row]) -> dict[tuple[int, int], int]:
    blocks = {(row.layer, row.block) for row in rows}
    return {block: draw.choice([0, 1, 13, 200]) for block in sorted(blocks) if draw.random() < 0.8}


def random_candidates(draw: random.Random, rows: list[Row], scores: Scores) -> tuple[set[Row], Flags]:
    keep = draw.choice([0, 0, 1, 2, 30])
    layers = sorted({row.layer for row in rows})
    frozen = set(draw.sample(layers, draw.randint(0, len(layers)))) if draw.random() < 0.4 else set()
    free = protect_best(scores, keep) & np.array([row.layer not in frozen for row in rows])
    naive = {row for row in unprotected(rows, keep) if row.layer not in frozen}
    assert {row for row in rows if free[row.place]} == naive
    return naive, free


def chosen(rows: list[Row], pruned: Flags) -> set[Row]:
    return {row for row in rows if pruned[row.place]}


def largest_ratio(error: UserError) -> str:
    found = re.search(r"ratio is (0\.\d+)", str(error))
    assert found is not None, error
    return found.group(1)


@pytest.mark.parametrize("seed", range(10))
def test_global_selection_is_the_walk_over_the_units(seed: int) -> None:
    draw = random.Random(seed)
    refused = 0
    for _ in range(60):
        rows = random_rows(draw)
        scores = table(rows)
        assert ranking(scores).tolist() == [row.place for row in ranked(rows)]
        naive, free = random_candidates(draw, rows, scores)
        overhead = random_overhead(draw, rows)
        everything = sum(row.cost for row in rows) + sum(overhead.values())
        budget = budget_of(everything + 50, round(draw.random(), 3), overhead, draw.choice([1, 1, 2, 3, 8, 64]))
        try:
            expected = prefix(rows, naive, budget.parameters, overhead, budget.round_to)
        except UnreachableError as unreachable:
            refused += 1
            largest = int(unreachable.parameters / budget.total_parameters * 1e4) / 1e4
            with pytest.raises(UserError, match=rf"largest reachable ratio is {largest:.4f} of all"):
                select_global(scores, free, budget)
        else:
            assert chosen(rows, select_global(scores, free, budget)) == expected
    assert 0 < refused < 60


@pytest.mark.parametrize("seed", range(10))
def test_uniform_selection_takes_the_same_lowest_units_of_every_layer_up_to_the_budget(seed: int) -> None:
    draw = random.Random(seed)
    decided = refused = 0
    for _ in range(60):
        rows = random_rows(draw)
        scores = table(rows)
        naive, free = random_candidates(draw, rows, scores)
        if not naive:
            continue
        total, round_to = sum(row.cost for row in rows), draw.choice([1, 2, 3, 64])
        ratio, layer = round(draw.random(), 3), next(row.layer for row in rows if row in naive)
        inside = {block: [row for row in rows if (row.layer, row.block) == (layer, block)] for block in (0, 1)}
        try:
            removed = chosen(rows, select_uniform(scores, free, budget_of(total, ratio, {}, round_to)))
        except UserError as error:
            refused += 1
            ratio = float(largest_ratio(error))
            removed = chosen(rows, select_uniform(scores, free, budget_of(total, ratio, {}, round_to)))
        decided += bool(removed)
        groups, channels = (len(removed & set(inside[block])) for block in (0, 1))
        assert removed == lowest_of_each(rows, naive, (groups, channels))
        assert groups < len(inside[GROUP])
        assert channels < len(inside[CHANNEL])
        assert channels == 0 or (len(inside[CHANNEL]) - channels) % round_to == 0
        # Never short in silence: by less than the unit that is left to give, in every layer.
        layers = len({row.layer for row in naive})
        unit = max(min(round_to, len(inside[CHANNEL])) * inside[CHANNEL][0].cost, inside[GROUP][0].cost) + 1
        spent = sum(row.cost for row in removed)
        assert int(ratio * total) - layers * unit < spent <= ratio * total + 1e-9
    assert decided
    assert refused


GROUPS, CHANNELS = 3, 12
EXTRAS = {(layer, block): 5 + block for layer in range(3) for block in (0, 1)}


def units(seed: int) -> list[Row]:
    """Three layers of 3 groups of 40 and 12 channels of 7 parameters, with many exact ties."""
    draw = random.Random(seed)
    keys = [(layer, b, u) for layer in range(3) for b, n in ((GROUP, GROUPS), (CHANNEL, CHANNELS)) for u in range(n)]
    values = [float(draw.randrange(1, 12)) for _ in keys]
    return [Row(i, *key, (40, 7)[key[1]], values[i], values[i]) for i, key in enumerate(keys)]


def test_whether_a_ratio_is_reachable_depends_on_shapes_alone() -> None:
    """Constant importances are checked before any weight is read; the answer must hold for measured ones too."""
    tables = [table(units(seed)) for seed in range(10)]
    for thousandths in range(600, 660):
        answers = set()
        for scores in tables:
            try:
                select_global(scores, np.ones(45, dtype=bool), budget_of(1000, thousandths / 1000, EXTRAS))
                answers.add("reached")
            except UserError as error:
                answers.add(str(error))
        assert len(answers) == 1, (thousandths, answers)


def test_budget_is_exact_where_floating_point_is_not() -> None:
    assert int(0.29 * 100) == 28  # what must not happen
    assert Budget(100, 0.29, {}).parameters == 29
    assert Budget(1000, 0.057, {}).parameters == 57
    assert Budget(10**12 + 7, 0.2, {}).parameters == (10**12 + 7) // 5
    assert Budget(1000, 1e-05, {}).parameters == 0


def test_the_units_of_an_8b_model_are_decided_in_seconds() -> None:
    """459,008 units take half a second on two idle cores; a loop over them takes far more than the limit."""
    draw, per_layer, round_to = np.random.default_rng(0), 8 + 14336, 64
    layer = np.arange(32).repeat(per_layer)
    code = np.tile(np.arange(per_layer) >= 8, 32).astype(np.int64)
    unit = np.tile(np.concatenate([np.arange(8), np.arange(14336)]), 32)
    cost = np.where(code == BLOCKS.index(Block.ATTENTION), 10_000_000, 12_288)
    base = draw.integers(0, 10_000_000, len(layer)).astype(np.float64)  # with ties among the channels
    prior = (draw.random(32) + 0.5)[layer]
    scores = Scores(layer, code, unit, base * cost, cost, prior, base * prior, np.zeros(len(layer), dtype=bool), base)
    overhead = {(layer, block): 4096 for layer in range(32) for block in (0, 1)}
    budget = budget_of(8_000_000_000, 0.3, overhead, round_to)
    start = time.process_time()
    free = protect_best(scores, 1)
    for select, slack in ((select_global, 2 * 10_000_000), (select_uniform, 34 * 10_000_000)):
        spent = int(scores.cost[select(scores, free, budget)].sum())
        assert 0 <= budget.parameters - spent < slack + 32 * round_to * 12_288
    assert time.process_time() - start < 8


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_every_layer_keeps_multiples_of_groups_and_channels(allocation: Any, ratio: float) -> None:
    """Also where the dense width is no multiple, and where a layer would lose nothing."""
    views = layer_structures(make_tiny(heads=8, kv_heads=4, channels=45))
    total, generator = sum(view.cost for view in views), torch.Generator().manual_seed(5)
    importance = [
        {block: torch.rand(view.units(block), generator=generator) + 10 * (view.index == 2) for block in view.prunable}
        for view in views
    ]
    scores = group_scores(views, importance)
    selection = GroupSelection(allocation, round_to=8, groups_multiple_of=2)
    pruned = replace(scores, pruned=selection.select(scores, views, total, ratio))
    kept = kept_units(pruned, views)
    assert all(len(layer.kept[Block.ATTENTION]) % 2 == 0 and len(layer.kept[Block.MLP]) % 8 == 0 for layer in kept)
    assert len(kept[2].kept[Block.MLP]) == 40 or allocation == "uniform"
    assert selection.unrounded(pruned, views) == ""
    removed = int(scores.cost[pruned.pruned].sum())
    bundles = max(2 * views[0].unit_cost(Block.ATTENTION), 8 * views[0].unit_cost(Block.MLP))
    assert ratio * total - len(views) * bundles < removed <= ratio * total
    for layer in kept:  # the lowest are removed, whatever the layer
        for block, units in layer.kept.items():
            gone = [unit for unit in range(views[0].units(block)) if unit not in units]
            values = importance[layer.layer][block]
            assert not gone or not units or values[gone].max() <= values[units].min()


@pytest.mark.parametrize(
    ("options", "ratio", "layers"),
    [
        ({"freeze_first_n_layers": 1}, 0.2, "0 \\(45\\)"),
        ({}, 0.001, "0 \\(45\\), 1 \\(45\\), 2 \\(45\\), 3 \\(45\\)"),
    ],
)
def test_where_a_multiple_cannot_hold_it_says_so(options: dict[str, int], ratio: float, layers: str) -> None:
    views = layer_structures(make_tiny(kv_heads=4, channels=45))
    selection, scores = GroupSelection(round_to=8, **options), group_scores(views)
    pruned = selection.select(scores, views, sum(view.cost for view in views), ratio)
    assert re.search(
        rf"round_to 8 does not hold .* {layers}\. ", selection.unrounded(replace(scores, pruned=pruned), views)
    )


def test_rows_are_in_the_order_of_layer_block_and_unit() -> None:
    views = layer_structures(make_tiny())
    scores = group_scores(views, [{Block.ATTENTION: torch.rand(2), Block.MLP: torch.rand(40)} for _ in views])
    rows = list(zip(scores.layer.tolist(), scores.block.tolist(), scores.unit.tolist(), strict=True))
    assert rows == [(layer, b, u) for layer in range(4) for b, n in (("attention", 2), ("mlp", 40)) for u in range(n)]
    group = 2 * 2 * 8 * 32 + 2 * 8 * 32  # two query heads, one k, one v
    assert set(scores.cost[scores.of_kind(Block.ATTENTION)].tolist()) == {group}
    assert set(scores.cost[scores.of_kind(Block.MLP)].tolist()) == {3 * 32}
    assert np.array_equal(scores.score, scores.importance / scores.cost)
    layers = layer_scores(torch.tensor([0.1, 0.5]), [50, 60])
    assert layers.whole_layers
    assert layers.cost.tolist() == [50, 60]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_importance_that_is_not_finite_names_layer_and_block(value: float) -> None:
    views = layer_structures(make_tiny())
    importance = [{Block.ATTENTION: torch.ones(2), Block.MLP: torch.ones(40)} for _ in views]
    importance[2][Block.MLP][7] = value
    with pytest.raises(FloatingPointError, match="layer 2, mlp: 1 importances are NaN or infinite"):
        group_scores(views, importance)


def test_groups_that_are_no_multiple_are_refused_with_those_that_are() -> None:
    views = layer_structures(make_tiny(kv_heads=4))
    with pytest.raises(UserError, match=r"groups_multiple_of: found 3, but layer 0 has 4 .* divides them: 1, 2, 4\."):
        GroupSelection(groups_multiple_of=3).select(group_scores(views), views, 100_000, 0.1)
