"""Scores → which units go: one global ranking, or the same share of every layer."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from lightning_prune.methods.blocks import BlockIndex, block_index
from lightning_prune.methods.scores import Scores
from lightning_prune.support.errors import UserError


@dataclass(frozen=True)
class Budget:
    """How many parameters may go, and what leaves together with the last unit of a block.

    ``overhead[layer, block]`` counts the parameters (norms, output bias) that leave with the whole block, so the
    achieved ratio never exceeds the requested one by them. ``round_to``: every layer keeps a multiple of this
    many channels. ``added``: parameters that pruning brings along, which leave beside the ratio; costs count them.
    """

    total_parameters: int
    pruning_ratio: float
    overhead: dict[tuple[int, int], int]
    round_to: int = 1
    added: int = 0

    @property
    def parameters(self) -> int:
        """pruning_ratio × all parameters, rounded down; exact, since 0.29 × 100 is 28.999… in floating point."""
        return math.floor(Fraction(str(self.pruning_ratio)) * self.total_parameters) + self.added


def ranking(scores: Scores) -> Tensor:
    """Unit rows from first to go to last, int64 ``[U]``.

    Ascending by (score, importance per parameter, layer, attention before mlp, unit): H-GSP rule 2, so units
    whose prior is zero are ordered by what they weigh, and no tie depends on the sort's implementation.
    """
    by_value = (scores.base.numpy(), scores.score.numpy())
    by_place = (scores.unit.numpy(), scores.block.numpy(), scores.layer.numpy())
    if _ascending(*reversed(by_place)):  # as tables are made; the sort is stable, so two keys do for five
        return torch.from_numpy(np.lexsort(by_value))
    return torch.from_numpy(np.lexsort((*by_place, *by_value)))


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
    order = ranking(scores)
    order = order[candidates[order]]
    index = block_index(scores)
    overhead = _overhead(index, budget)
    if len(order) == len(scores.cost):
        _check_that_something_stays(index, scores.cost, overhead, budget)
    ids, cost, rank = index.ids[order], scores.cost[order], index.rank(order)
    left = index.size[ids] - rank - 1  # in the block once this unit is gone
    # Channels wait for the one that closes their bundle; groups are bundles of one. Everything below is by place in
    # the ranking: where a unit's bundle closes (past the end if never), and what the bundles closed there cost.
    closes = torch.where(index.block[ids] == 1, left % budget.round_to == 0, True)
    closing = _next_in_block(ids, closes)
    leaves = closing < len(order)
    price = torch.zeros(len(order), dtype=torch.int64)
    price.index_add_(0, closing[leaves], cost[leaves])
    price += torch.where(left == 0, overhead[ids], 0)
    spent = price.cumsum(0)
    stop = int(torch.searchsorted(spent, budget.parameters, right=True))  # the first place that does not fit
    if stop == len(order) and (reached := int(price.sum())) < budget.parameters:
        raise _unreachable(reached, budget)
    pruned = torch.zeros(len(scores.cost), dtype=torch.bool)
    pruned[order[closing < stop]] = True
    return pruned


def select_uniform(scores: Scores, candidates: Tensor, budget: Budget) -> Tensor:
    """The same number of groups and of channels from every candidate layer, lowest scores first, bool ``[U]``.

    ρ = budget / candidate parameters; each layer loses ⌊K·ρ + ½⌋ GQA groups (fewer if that is too much) and as
    many channels as then fit, so every layer ends with the same widths and the checkpoint is a stock one.

    Raises:
        UserError: the ratio cannot be reached while every layer keeps one group and one channel.
    """
    layers = scores.layer[candidates].unique()
    first = int(layers[0])
    attention = scores.of(first, "attention")
    mlp = scores.of(first, "mlp")
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
    drop = torch.tensor([drop_groups, drop_channels, 0])[scores.block[order]]
    pruned[order[block_index(scores).rank(order) < drop]] = True
    return pruned


def protect_best(scores: Scores, keep: int) -> Tensor:
    """Candidates when every block of every layer keeps its ``keep`` highest-scored units, bool ``[U]``."""
    candidates = torch.ones(len(scores.layer), dtype=torch.bool)
    if keep == 0:
        return candidates
    order = ranking(scores)
    index = block_index(scores)
    candidates[order] = index.rank(order) < index.size[index.ids[order]] - keep
    return candidates


def _ascending(*keys: np.ndarray) -> bool:
    """Whether the rows are in ascending order of these keys, the first one counting most."""
    before = np.zeros(max(0, len(keys[0]) - 1), dtype=bool)  # a row that an earlier key puts before the next one
    for key in keys:
        if bool((~before & (key[:-1] > key[1:])).any()):
            return False
        before |= key[:-1] < key[1:]
    return True


def _next_in_block(ids: Tensor, marked: Tensor) -> Tensor:
    """For every place of a sequence, the first place at or behind it that is marked and has the same id, int64; the
    length of the sequence where there is none."""
    by_block = ids.argsort(stable=True).flip(0)
    # From the last place of every block to its first, blocks apart: the smallest marked place so far.
    apart = (ids[by_block[0]] - ids[by_block]) if len(ids) else ids
    nothing = len(ids)
    places = torch.where(marked[by_block], by_block, nothing)
    smallest = (places - apart * (nothing + 1)).cummin(0).values + apart * (nothing + 1)
    found = torch.empty_like(by_block)
    found[by_block] = smallest
    return found


def _overhead(index: BlockIndex, budget: Budget) -> Tensor:
    """Parameters that leave with the last unit of each block, int64 ``[B]``."""
    blocks = zip(index.layer.tolist(), index.block.tolist(), strict=True)
    return torch.tensor([budget.overhead.get(block, 0) for block in blocks], dtype=torch.int64)


def _check_that_something_stays(index: BlockIndex, cost: Tensor, overhead: Tensor, budget: Budget) -> None:
    """Refuse a budget that could take all units, whatever their order: then the shapes alone decide, and the answer
    before calibration is the answer after it.

    Args:
        index: the blocks.
        cost: parameters of every unit ``[U]``, the same within a block.
        overhead: see ``_overhead``.
    """
    block_cost = index.sum(cost)
    bundle = torch.where(index.block == 1, index.size.clamp(max=budget.round_to), 1)
    dearest = int((bundle * (block_cost // index.size) + overhead).max())
    largest = int((block_cost + overhead).sum()) - dearest
    if budget.parameters > largest:
        raise _unreachable(largest, budget)


def _rounded_down(drop: int, channels: int, round_to: int) -> int:
    """Largest number ≤ drop that leaves a multiple of round_to channels (0 where none does)."""
    kept = -(-(channels - drop) // round_to) * round_to
    return max(0, channels - kept)


def _unreachable(reachable: int, budget: Budget) -> UserError:
    largest = int((reachable - budget.added) / budget.total_parameters * 1e4) / 1e4
    return UserError(
        f"--model.pruning_ratio: {budget.pruning_ratio:g} cannot be reached with these options. The largest reachable "
        f"ratio is {largest:.4f} of all {budget.total_parameters:,} parameters (embeddings, head and frozen layers "
        "stay). Lower --model.pruning_ratio, or freeze fewer layers."
    )
