"""Which experts, or channels inside experts, are pruned: equally many of every group, the lowest scores of each, since
a model has one number of experts and one width of all. A group is an expert's channels, or the experts of a layer (of
a group of its router). The lowest units of all groups are a bundle, which is ranked by their mean score."""

import math
from dataclasses import replace

import numpy as np

from lightning_prune.checkpoint.scores import Flags, Integers, Scores
from lightning_prune.methods.selection import (
    Allocation,
    Budget,
    GroupSelection,
    TooLittle,
    beyond_multiple,
    protect_best,
    ranking,
    select_global,
    select_uniform,
)
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError

# transformers' and vLLM's products of all experts at once take rows of 16 bytes or a multiple, 8 numbers of bfloat16.
WIDTH_MULTIPLE = 8


def expert_rows(scores: Scores) -> Flags:
    """Rows of experts or of their channels, bool ``[U]``."""
    return scores.of_kind(Block.EXPERT) | scores.of_kind(Block.EXPERT_CHANNEL)


def select_with_experts(
    selection: GroupSelection, scores: Scores, layers: list[LayerStructure], budget: Budget, protected: Flags
) -> Flags:
    """``GroupSelection.select`` for a model with experts; ``protected`` bool ``[U]`` are whole experts that are kept.

    Raises:
        UserError: the budget cannot be reached with these options, or without a protected expert.
    """
    if selection.freeze_first_n_layers or selection.freeze_last_n_layers:
        raise UserError(
            "--model.freeze_first_n_layers and --model.freeze_last_n_layers leave layers untouched, but all layers "
            "keep equally many experts of one width. Leave them out."
        )
    selection.check_groups(layers)
    experts = next(view.experts for view in layers if view.experts is not None)
    whole = bool(scores.of_kind(Block.EXPERT).any())
    groups = experts.router_groups if whole else experts.total
    keep = max(-(-experts.fewest // groups) if whole else 1, selection.min_groups_per_layer)
    multiple = 1 if whole else math.lcm(selection.round_to, WIDTH_MULTIPLE)
    free = protect_best(scores, selection.min_groups_per_layer) | expert_rows(scores)
    if layers[0].whole_attention is not None:
        free &= ~scores.of_kind(Block.ATTENTION)
    score = np.where(beyond_multiple(scores, free, budget), -np.inf, scores.score)
    ranked = replace(scores, score=np.where(protected, np.inf, score))
    beyond = not whole and experts.width % selection.round_to > 0
    pruned = select_experts(ranked, free, budget, selection.allocation, groups, keep, multiple, beyond)
    if (pruned & protected).any():
        row = int(np.argmax(pruned & protected))
        raise UserError(
            f"--model.pruning_ratio: at {float(budget.pruning_ratio):g} layer {scores.layer[row]} loses expert "
            f"{scores.unit[row]}, whose output peaks above all others. Lower it, or set --model.super_experts remove."
        )
    return pruned


def select_experts(
    scores: Scores,
    free: Flags,
    budget: Budget,
    allocation: Allocation,
    groups: int,
    keep: int,
    multiple: int,
    beyond: bool = False,
) -> Flags:
    """Select the units to prune, bool ``[U]``.

    Args:
        scores: of U units, with experts or their channels in some layers.
        free: candidates, bool ``[U]``; where those of experts are not, experts are kept.
        budget: what to remove.
        allocation: of the other units; ``uniform`` gives them their share of the budget first.
        groups: that must keep equally many units in every layer: its experts, or the groups of its router.
        keep: units of a group that are kept at least.
        multiple: a multiple of so many is kept.
        beyond: whether what is beyond a multiple is removed first, so that it also holds where nothing else is.

    Raises:
        UserError: the budget cannot be reached, or it is smaller than one bundle and nothing else is a candidate.
    """
    experts = expert_rows(scores)
    others = ~experts
    pruned = np.zeros(len(free), dtype=bool)
    if allocation == "uniform" and bool((free & others).any()):
        part, whole = int(scores.cost[free & others].sum()), int(scores.cost[free].sum())
        share = budget.parameters * part // whole
        pruned[others] = select_uniform(scores.at(others), free[others], _to_remove(budget, share))
        free, budget = free & experts, _to_remove(budget, budget.parameters - int(scores.cost[pruned].sum()))
    bundle = _bundles(scores, free & experts, groups, keep, multiple)
    table = _bundled(scores, bundle, others)
    if beyond:
        table.score[0] = -np.inf
    count = int(bundle.max()) + 1
    # The last bundle is kept.
    candidates = np.concatenate([np.arange(count) < count - 1, free[others]])
    chosen = select_global(table, candidates, budget)
    pruned[others] |= chosen[count:]
    pruned[experts] |= chosen[bundle[experts]]
    if not pruned.any():
        smallest = _enough(int(table.cost[:1].sum()), int(table.cost[candidates].sum()), budget)
        raise TooLittle(
            f"--model.pruning_ratio: {float(budget.pruning_ratio):g} is less than the smallest step: one unit of every "
            f"layer's experts is {smallest} of all parameters. Give at least that."
        )
    return pruned


def _enough(smallest: int, largest: int, budget: Budget) -> str:
    """The ratio that removes ``smallest`` parameters, rounded up: to four digits, or to more where these are beyond the
    ``largest`` number that can be removed."""
    total = budget.total_parameters
    for digits in range(4, 14):
        share = -(-(smallest - budget.added) * 10**digits // total)
        if share * total // 10**digits + budget.added <= largest:
            break
    return f"{share / 10**digits:.{digits}f}"


def _bundles(scores: Scores, free: Flags, groups: int, keep: int, multiple: int) -> Integers:
    """The bundle of every unit of experts, int64 ``[U]``: from 0, the first one to be pruned, to the one that is kept;
    -1 for other units."""
    bundle = np.where(expert_rows(scores), 0, -1)
    order = ranking(scores)
    order = order[free[order]]
    if not len(order):
        return bundle
    blocks = scores.blocks
    size = blocks.size[blocks.ids[order]] // groups  # units per group
    group = blocks.ids[order] * groups + scores.unit[order] // size
    by_group = group.argsort(kind="stable")
    counts = np.bincount(group)
    rank = np.empty_like(by_group)
    rank[by_group] = np.arange(len(order)) - (counts.cumsum() - counts)[group[by_group]]
    left = size - rank - 1  # once the unit is gone
    # Units wait until a multiple of them can be removed.
    closing = size - left // multiple * multiple - 1
    kept = size - closing - 1
    stays = kept < max(keep, 1 if multiple == 1 else multiple)
    closing[stays] = size.max()
    bundle[order] = np.unique(np.append(closing, size.max()), return_inverse=True)[1].reshape(-1)[:-1]
    return bundle


def _bundled(scores: Scores, bundle: Integers, others: Flags) -> Scores:
    """One row per bundle, then those of ``others``."""
    rows, count = bundle >= 0, int(bundle.max()) + 1
    index = bundle[rows]
    cost = np.zeros(count, dtype=np.int64)
    np.add.at(cost, index, scores.cost[rows])

    def mean(values: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return np.bincount(index, values[rows] * scores.cost[rows], minlength=count) / np.maximum(cost, 1)

    head = {
        "layer": np.full(count, scores.layer[rows].min()),
        "code": np.full(count, scores.code[rows][0]),
        "unit": np.arange(count),
        "importance": np.bincount(index, scores.importance[rows], minlength=count),
        "cost": cost,
        "prior": np.ones(count),
        "score": mean(scores.score),
        "pruned": np.zeros(count, dtype=bool),
        "base": mean(scores.base),
    }
    return Scores(**{name: np.concatenate([values, getattr(scores, name)[others]]) for name, values in head.items()})


def _to_remove(budget: Budget, parameters: int) -> Budget:
    """A copy of the budget that removes so many parameters."""
    return replace(budget, added=budget.added + parameters - budget.parameters)
