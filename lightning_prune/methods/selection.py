"""Scores → which units go: one global ranking, or the same share of every layer."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from lightning_prune.errors import UserError
from lightning_prune.methods.scores import Scores


@dataclass(frozen=True)
class Budget:
    """How many parameters may go, and what leaves together with the last unit of a block.

    ``overhead[layer, block]`` counts the parameters (norms, output bias) that leave with the whole block, so the
    achieved ratio never exceeds the requested one by them. ``round_to``: every layer keeps a multiple of this
    many channels.
    """

    total_parameters: int
    pruning_ratio: float
    overhead: dict[tuple[int, int], int]
    round_to: int = 1

    @property
    def parameters(self) -> int:
        """pruning_ratio × all parameters, rounded down; exact, since 0.29 × 100 is 28.999… in floating point."""
        return math.floor(Fraction(str(self.pruning_ratio)) * self.total_parameters)


def ranking(scores: Scores) -> Tensor:
    """Unit rows from first to go to last, int64 ``[U]``.

    Ascending by (score, importance per parameter, layer, attention before mlp, unit): H-GSP rule 2, so units
    whose prior is zero are ordered by what they weigh, and no tie depends on the sort's implementation.
    """
    keys = (scores.unit, scores.block, scores.layer, scores.base, scores.score)
    return torch.from_numpy(np.lexsort([key.numpy() for key in keys]))


def select_global(scores: Scores, candidates: Tensor, budget: Budget) -> Tensor:
    """Longest prefix of the ranking whose parameters stay within the budget (H-GSP rule 8), bool ``[U]``.

    The walk stops at the first unit that does not fit. With ``round_to`` a layer's channels leave in multiples
    of it, lowest first; the shortfall is then below one such bundle per layer.

    Args:
        scores: U units.
        candidates: bool ``[U]``; False for units of frozen layers and protected ones.

    Raises:
        UserError: the ratio cannot be reached, or every layer would vanish; names the largest reachable ratio.
    """
    order = [row for row in ranking(scores).tolist() if candidates[row]]
    blocks = list(zip(scores.layer.tolist(), scores.block.tolist(), strict=True))
    cost = scores.cost.tolist()
    left: dict[tuple[int, int], int] = defaultdict(int)
    for block in blocks:
        left[block] += 1
    if len(order) == len(cost):
        _check_that_something_stays(left, dict(zip(blocks, cost, strict=True)), budget)
    waiting: dict[tuple[int, int], list[int]] = defaultdict(list)
    removed: list[int] = []
    removed_parameters = 0
    for row in order:
        block = blocks[row]
        bundle = [*waiting[block], row]
        remaining = left[block] - len(bundle)
        if block[1] == 1 and remaining % budget.round_to:
            waiting[block] = bundle
            continue
        price = sum(cost[member] for member in bundle) + (budget.overhead.get(block, 0) if remaining == 0 else 0)
        if removed_parameters + price > budget.parameters:
            break
        removed += bundle
        removed_parameters += price
        left[block], waiting[block] = remaining, []
    else:
        if removed_parameters < budget.parameters:
            raise _unreachable(removed_parameters, budget)
    pruned = torch.zeros(len(cost), dtype=torch.bool)
    pruned[removed] = True
    return pruned


def select_uniform(scores: Scores, candidates: Tensor, budget: Budget) -> Tensor:
    """The same number of groups and of channels from every candidate layer, lowest scores first, bool ``[U]``.

    ρ = budget / candidate parameters; each layer loses ⌊K·ρ + ½⌋ GQA groups (fewer if that is too much) and as
    many channels as then fit, so every layer ends with the same widths and the checkpoint is a stock one.

    Raises:
        UserError: the ratio cannot be reached while every layer keeps one group and one channel.
    """
    layers = sorted(set(scores.layer[candidates].tolist()))
    attention = scores.of(layers[0], "attention")
    mlp = scores.of(layers[0], "mlp")
    groups, channels = int(attention.sum()), int(mlp.sum())
    group_cost, channel_cost = int(scores.cost[attention][0]), int(scores.cost[mlp][0])
    free_groups, free_channels = int((attention & candidates).sum()), int((mlp & candidates).sum())
    free_groups, free_channels = min(free_groups, groups - 1), min(free_channels, channels - 1)

    share = budget.parameters // len(layers)
    most_channels = _rounded_down(free_channels, channels, budget.round_to)
    largest = free_groups * group_cost + most_channels * channel_cost
    if share > largest:
        raise _unreachable(len(layers) * largest, budget)
    rho = share / (groups * group_cost + channels * channel_cost)
    most_groups = min(free_groups, share // group_cost)
    drop_groups = min(int(groups * rho + 0.5), most_groups)
    # What the channels cannot give, groups do.
    while drop_groups < most_groups and (share - drop_groups * group_cost) // channel_cost > most_channels:
        drop_groups += 1
    wanted = min((share - drop_groups * group_cost) // channel_cost, most_channels)
    drop_channels = _rounded_down(wanted, channels, budget.round_to)

    pruned = torch.zeros(len(scores.layer), dtype=torch.bool)
    order = ranking(scores)
    order = order[candidates[order]]
    for layer in layers:
        for block, count in ((0, drop_groups), (1, drop_channels)):
            inside = order[(scores.layer[order] == layer) & (scores.block[order] == block)]
            pruned[inside[:count]] = True
    return pruned


def protect_best(scores: Scores, keep: int) -> Tensor:
    """Candidates when every block of every layer keeps its ``keep`` highest-scored units, bool ``[U]``."""
    candidates = torch.ones(len(scores.layer), dtype=torch.bool)
    if keep == 0:
        return candidates
    order = ranking(scores)
    for layer in set(scores.layer.tolist()):
        for block in (0, 1):
            inside = order[(scores.layer[order] == layer) & (scores.block[order] == block)]
            candidates[inside[-keep:]] = False
    return candidates


def _check_that_something_stays(
    units: Mapping[tuple[int, int], int], unit_cost: Mapping[tuple[int, int], int], budget: Budget
) -> None:
    """Refuse a budget that could take all units, whatever their order: then the shapes alone decide, and the answer
    before calibration is the answer after it.

    Args:
        units: number of units by (layer, block).
        unit_cost: parameters of one of them.
    """
    block_cost = {block: count * unit_cost[block] + budget.overhead.get(block, 0) for block, count in units.items()}
    last = {block: min(count, budget.round_to if block[1] == 1 else 1) for block, count in units.items()}
    dearest = max(last[block] * unit_cost[block] + budget.overhead.get(block, 0) for block in units)
    largest = sum(block_cost.values()) - dearest
    if budget.parameters > largest:
        raise _unreachable(largest, budget)


def _rounded_down(drop: int, channels: int, round_to: int) -> int:
    """Largest number ≤ drop that leaves a multiple of round_to channels (0 where none does)."""
    kept = -(-(channels - drop) // round_to) * round_to
    return max(0, channels - kept)


def _unreachable(reachable: int, budget: Budget) -> UserError:
    largest = int(reachable / budget.total_parameters * 1e4) / 1e4
    return UserError(
        f"--model.pruning_ratio: {budget.pruning_ratio:g} cannot be reached with these options. The largest reachable "
        f"ratio is {largest:.4f} of all {budget.total_parameters:,} parameters (embeddings, head and frozen layers "
        "stay). Lower --model.pruning_ratio, or freeze fewer layers."
    )
