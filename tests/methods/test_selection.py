import random
import re
from dataclasses import replace

import pytest
import torch

from lightning_prune.methods.scores import Scores
from lightning_prune.methods.selection import Budget, protect_best, ranking, select_global, select_uniform
from lightning_prune.support.errors import UserError
from tests.methods.reference import Unit, cost_of, greedy

LAYERS, GROUPS, CHANNELS = 3, 3, 12
COST = {0: 40, 1: 7}  # parameters of a GQA group and of a channel
EXTRAS = {(layer, block): 5 + block for layer in range(LAYERS) for block in (0, 1)}
PRUNABLE = LAYERS * (GROUPS * COST[0] + CHANNELS * COST[1])
EVERYTHING = PRUNABLE + sum(EXTRAS.values())
TOTAL = 1000  # embeddings and the like make up the rest


def random_units(seed: int) -> list[Unit]:
    """Importances with many exact ties per parameter."""
    draw = random.Random(seed)
    return [
        Unit(layer, block, unit, float(draw.randrange(1, 12) * COST[block]), COST[block])
        for layer in range(LAYERS)
        for block, count in ((0, GROUPS), (1, CHANNELS))
        for unit in range(count)
    ]


def scores_of(units: list[Unit]) -> Scores:
    columns = {
        name: torch.tensor([getattr(unit, name) for unit in units]) for name in ("layer", "block", "unit", "cost")
    }
    importance = torch.tensor([unit.importance for unit in units], dtype=torch.float64)
    base = importance / columns["cost"]
    prior, pruned = torch.ones_like(base), torch.zeros(len(units), dtype=torch.bool)
    return Scores(importance=importance, base=base, score=base, prior=prior, pruned=pruned, **columns)


def chosen(units: list[Unit], pruned: torch.Tensor) -> set[Unit]:
    return {unit for unit, gone in zip(units, pruned.tolist(), strict=True) if gone}


def largest_ratio(error: UserError) -> str:
    found = re.search(r"ratio is (0\.\d+)", str(error))
    assert found is not None, error
    return found.group(1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratio", [0.05, 0.13, 0.2, 0.29, 0.5])
@pytest.mark.parametrize(
    "rules",
    [{}, {"round_to": 4}, {"round_to": 5}, {"frozen": (0,)}, {"keep": 1}, {"round_to": 3, "keep": 2, "frozen": (2,)}],
    ids=str,
)
def test_global_selection_is_the_longest_prefix_that_fits(seed: int, ratio: float, rules: dict) -> None:
    units = random_units(seed)
    scores = scores_of(units)
    free = protect_best(scores, rules.get("keep", 0))
    free &= torch.tensor([unit.layer not in rules.get("frozen", ()) for unit in units])
    budget = Budget(TOTAL, ratio, EXTRAS, rules.get("round_to", 1))
    assert budget.parameters == {0.05: 50, 0.13: 130, 0.2: 200, 0.29: 290, 0.5: 500}[ratio]
    if ratio > LARGEST.get(str(rules), 0.6):
        with pytest.raises(UserError, match=f"largest reachable ratio is {LARGEST[str(rules)]}"):
            select_global(scores, free, budget)
    else:
        assert chosen(units, select_global(scores, free, budget)) == greedy(units, budget.parameters, EXTRAS, **rules)


# By hand, in thousandths. Layers 1 and 2 whole: 2 · (3 · 40 + 12 · 7 + 5 + 6). All but the best unit of every block:
# 3 · (2 · 40 + 11 · 7). Layers 0 and 1, a group and 9 of the channels each: 2 · (40 + 9 · 7).
LARGEST = {
    str({"frozen": (0,)}): 0.43,
    str({"keep": 1}): 0.471,
    str({"round_to": 3, "keep": 2, "frozen": (2,)}): 0.206,
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "options", [{}, {"round_to": 4}, {"frozen": (1,)}, {"keep": 2}, {"round_to": 8, "keep": 1}], ids=str
)
def test_the_largest_reachable_ratio_can_be_reached(seed: int, options: dict) -> None:
    units = random_units(seed)
    scores = scores_of(units)
    free = protect_best(scores, options.get("keep", 0))
    free &= torch.tensor([unit.layer not in options.get("frozen", ()) for unit in units])
    round_to = options.get("round_to", 1)
    with pytest.raises(UserError, match=r"0\.95 cannot be reached") as refused:
        select_global(scores, free, Budget(TOTAL, 0.95, EXTRAS, round_to))
    ratio = float(largest_ratio(refused.value))
    removed = chosen(units, select_global(scores, free, Budget(TOTAL, ratio, EXTRAS, round_to)))
    largest_unit = max(COST[0], round_to * COST[1]) + max(EXTRAS.values())
    assert ratio * TOTAL - largest_unit < cost_of(units, removed, EXTRAS) <= ratio * TOTAL
    assert len(removed) < len(units)


def test_whether_a_ratio_is_reachable_depends_on_shapes_alone() -> None:
    """Constant importances are checked before any weight is read; the answer must hold for measured ones too."""
    for thousandths in range(600, 660):
        answers = set()
        for seed in range(10):
            scores = scores_of(random_units(seed))
            try:
                select_global(scores, torch.ones(len(scores.layer), dtype=torch.bool), budget_of(thousandths / 1000))
                answers.add("reached")
            except UserError as error:
                answers.add(str(error))
        assert len(answers) == 1, (thousandths, answers)


def budget_of(ratio: float, round_to: int = 1) -> Budget:
    return Budget(TOTAL, ratio, EXTRAS, round_to)


def test_budget_is_exact_where_floating_point_is_not() -> None:
    assert int(0.29 * 100) == 28  # what must not happen
    assert Budget(100, 0.29, {}).parameters == 29
    assert Budget(1000, 0.057, {}).parameters == 57
    assert Budget(10**12 + 7, 0.2, {}).parameters == (10**12 + 7) // 5
    assert Budget(1000, 1e-05, {}).parameters == 0


def test_ranking_breaks_ties_by_base_then_layer_then_block_then_unit() -> None:
    rows = [  # (score, base, layer, block, unit), in the order in which they must go
        (0.0, 1.0, 2, 1, 5),
        (0.0, 2.0, 0, 0, 0),
        (1.0, 0.5, 0, 0, 1),
        (1.0, 0.5, 0, 1, 0),
        (1.0, 0.5, 0, 1, 2),
        (1.0, 0.5, 1, 0, 0),
        (2.0, 0.1, 0, 0, 2),
    ]
    shuffled = random.Random(1).sample(rows, len(rows))
    score, base, layer, block, unit = (torch.tensor(column) for column in zip(*shuffled, strict=True))
    ones, none = torch.ones(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
    scores = Scores(layer, block, unit, base, ones, ones, score.double(), none, base.double())
    assert [shuffled[row] for row in ranking(scores).tolist()] == rows


def test_walk_stops_at_the_first_unit_that_does_not_fit() -> None:
    units = [Unit(0, 0, 0, 1.0, 40), Unit(0, 0, 1, 99.0, 40), Unit(0, 1, 0, 2.0, 7), Unit(0, 1, 1, 99.0, 7)]
    scores = scores_of(units)
    pruned = select_global(scores, torch.ones(4, dtype=torch.bool), Budget(100, 0.3, {}))
    assert not bool(pruned.any())  # the group costs 40 of 30; the channel behind it would fit, but comes later


def test_last_unit_of_a_block_takes_the_norm_along() -> None:
    units = [Unit(0, 0, 0, 1.0, 40), Unit(0, 1, 0, 500.0, 30), Unit(1, 0, 0, 600.0, 40)]
    scores, free = scores_of(units), torch.ones(3, dtype=torch.bool)
    norm = {(0, 0): 5, (0, 1): 5, (1, 0): 5}
    assert not bool(select_global(scores, free, Budget(200, 0.224, norm)).any())
    assert select_global(scores, free, Budget(200, 0.225, norm)).tolist() == [True, False, False]


@pytest.mark.parametrize("ratio", [0.05, 0.13, 0.2, 0.26])
@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("frozen", [(), (1,)])
def test_uniform_takes_the_same_lowest_units_of_every_layer(ratio: float, round_to: int, frozen: tuple) -> None:
    units = random_units(3)
    scores = scores_of(units)
    free = torch.tensor([unit.layer not in frozen for unit in units])
    budget = budget_of(ratio, round_to)
    layers = LAYERS - len(frozen)
    removed = chosen(units, select_uniform(scores, free, budget))
    counts = {
        layer: tuple(len([u for u in removed if (u.layer, u.block) == (layer, block)]) for block in (0, 1))
        for layer in range(LAYERS)
        if layer not in frozen
    }
    assert len(set(counts.values())) == 1
    assert not [unit for unit in removed if unit.layer in frozen]
    (groups, channels) = counts[0]
    assert groups < GROUPS
    assert channels < CHANNELS
    assert (CHANNELS - channels) % round_to == 0
    spent = layers * (groups * COST[0] + channels * COST[1])
    bundle = COST[1] * round_to
    assert ratio * TOTAL - layers * bundle - layers < spent <= ratio * TOTAL
    for layer, block in ((layer, block) for layer in counts for block in (0, 1)):
        inside = [unit for unit in units if (unit.layer, unit.block) == (layer, block)]
        ranked = sorted(inside, key=lambda unit: (unit.importance, unit.unit))
        assert {unit for unit in removed if unit in inside} == set(ranked[: counts[layer][block]])


@pytest.mark.parametrize("options", [{}, {"round_to": 4}, {"keep": 2}, {"round_to": 8}, {"round_to": 64}], ids=str)
@pytest.mark.parametrize("frozen", [(), (0, 2)])
def test_uniform_names_the_largest_reachable_ratio(options: dict, frozen: tuple) -> None:
    units = random_units(4)
    scores = scores_of(units)
    free = protect_best(scores, options.get("keep", 0)) & torch.tensor([unit.layer not in frozen for unit in units])
    round_to = options.get("round_to", 1)
    with pytest.raises(UserError, match="cannot be reached") as refused:
        select_uniform(scores, free, budget_of(0.95, round_to))
    ratio = float(largest_ratio(refused.value))
    removed = chosen(units, select_uniform(scores, free, budget_of(ratio, round_to)))
    spent = cost_of(units, removed, {})
    layers = LAYERS - len(frozen)
    assert ratio * TOTAL - layers * COST[1] * min(round_to, CHANNELS) - layers < spent <= ratio * TOTAL


def test_uniform_never_falls_short_in_silence() -> None:
    """With 12 channels and multiples of 64 none can go; groups alone reach no more than two of three."""
    scores = scores_of(random_units(5))
    free = torch.ones(len(scores.layer), dtype=torch.bool)
    for percent in range(1, 60):
        try:
            pruned = select_uniform(scores, free, budget_of(percent / 100, 64))
        except UserError:
            continue
        spent = int(scores.cost[pruned].sum())
        assert percent / 100 * TOTAL - spent < LAYERS * (COST[0] + 1), percent


def test_protected_units_are_the_best_of_every_block() -> None:
    units = random_units(6)
    protected = {unit for unit, free in zip(units, protect_best(scores_of(units), 2).tolist(), strict=True) if not free}
    for layer in range(LAYERS):
        for block in (0, 1):
            inside = [unit for unit in units if (unit.layer, unit.block) == (layer, block)]
            ranked = sorted(inside, key=lambda unit: (unit.importance, unit.unit))
            assert {unit for unit in protected if unit in inside} == set(ranked[-2:])
    assert bool(protect_best(scores_of(units), 0).all())


def test_a_prior_reorders_but_does_not_change_the_budget() -> None:
    units = random_units(7)
    scores = scores_of(units)
    prior = torch.where(scores.layer == 0, 100.0, 1.0).double()
    pruned = select_global(
        replace(scores, prior=prior, score=scores.base * prior),
        torch.ones(len(units), dtype=torch.bool),
        budget_of(0.3),
    )
    assert not bool(pruned[scores.layer == 0].any())
    assert cost_of(units, chosen(units, pruned), EXTRAS) <= 300
