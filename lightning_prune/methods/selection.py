"""Scores → which units are pruned: one global ranking, or the same share of every layer."""

import math
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Literal

import numpy as np

from lightning_prune.checkpoint.scores import Flags, Integers, Scores
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import ROLES_OF, Block
from lightning_prune.support.errors import UserError

Allocation = Literal["global", "uniform"]


class TooLittle(UserError):
    """Raised when less is to be removed than the smallest step."""


@dataclass(frozen=True)
class Budget:
    """The number of parameters to remove, and what is removed together with the last unit of a block.

    ``overhead[layer, block]``: parameters (norms, output bias) that are removed with the whole block. ``round_to``,
    ``groups_multiple_of``: every layer keeps a multiple of this many channels, GQA groups. ``added``: parameters that
    pruning brings along, removed beside the ratio; costs count them.
    """

    total_parameters: int
    pruning_ratio: float | Fraction
    overhead: dict[tuple[int, Block], int]
    round_to: int = 1
    added: int = 0
    groups_multiple_of: int = 1

    def bundle(self, block: Block) -> int:
        """Units of the block that are removed together."""
        return {Block.MLP: self.round_to, Block.ATTENTION: self.groups_multiple_of}.get(block, 1)

    @property
    def parameters(self) -> int:
        """pruning_ratio × all parameters, rounded down; exact, since 0.29 × 100 is 28.999… in floating point."""
        return math.floor(Fraction(str(self.pruning_ratio)) * self.total_parameters) + self.added


@dataclass(frozen=True)
class GroupSelection:
    """Takes the lowest scores until the ratio is met; the fields are the options of ``GroupPruning``."""

    allocation: Allocation = "global"
    round_to: int = 1
    freeze_first_n_layers: int = 0
    freeze_last_n_layers: int = 0
    min_groups_per_layer: int = 0
    groups_multiple_of: int = 1

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name != "allocation"):
            if getattr(self, name) < (smallest := int(name in ("round_to", "groups_multiple_of"))):
                raise UserError(f"--model.{name}: found {getattr(self, name)}; it must be {smallest} or more.")

    def frozen_layers(self, num_layers: int) -> set[int]:
        """Layers that are never candidates; they are still measured and counted."""
        last = num_layers - self.freeze_last_n_layers
        return {layer for layer in range(num_layers) if not self.freeze_first_n_layers <= layer < last}

    def budget(
        self, layers: list[LayerStructure], total_parameters: int, ratio: float | Fraction, added: int = 0
    ) -> Budget:
        """The budget for the selection; arguments as for ``select``."""
        overhead = {
            (view.index, block): view.block_cost(block) - view.units(block) * view.unit_cost(block)
            for view in layers
            for block in view.prunable
        }
        return Budget(total_parameters, ratio, overhead, self.round_to, added, self.groups_multiple_of)

    def select(
        self,
        scores: Scores,
        layers: list[LayerStructure],
        total_parameters: int,
        ratio: float | Fraction,
        added: int = 0,
    ) -> Flags:
        """Select the units of ``scores`` to prune, bool ``[U]``: ``ratio`` of the dense parameters, and those ``added``
        by pruning. Raises UserError where that cannot be reached."""
        budget = self.budget(layers, total_parameters, ratio, added)
        self.check_groups(layers)
        free = ~np.isin(scores.layer, list(self.frozen_layers(len(layers))))
        if not free.any():
            raise UserError(
                f"--model.freeze_first_n_layers {self.freeze_first_n_layers} and --model.freeze_last_n_layers "
                f"{self.freeze_last_n_layers} leave none of the {len(layers)} layers to prune."
            )
        free &= protect_best(scores, self.min_groups_per_layer)
        uniform = self.allocation == "uniform"
        if groups_that_stay(layers, uniform):
            free &= ~scores.of_kind(Block.ATTENTION)
        free[best_attention(scores, layers)] = False
        scores = replace(scores, score=np.where(beyond_multiple(scores, free, budget), -np.inf, scores.score))
        choose = select_uniform if uniform else select_global
        try:
            return choose(scores, free, budget)
        except UserError as error:
            raise UserError(f"{error}{groups_that_stay(layers, uniform)}") from None

    def check_groups(self, layers: list[LayerStructure]) -> None:
        """Raise UserError where the GQA groups of a dense layer are not a multiple of ``groups_multiple_of``."""
        for view in layers:
            if (groups := view.units(Block.ATTENTION)) % self.groups_multiple_of:
                allowed = ", ".join(str(number) for number in range(1, groups + 1) if groups % number == 0)
                raise UserError(
                    f"--model.groups_multiple_of: found {self.groups_multiple_of}, but layer {view.index} has {groups} "
                    f"GQA groups; allowed is what divides them: {allowed}."
                )

    def unrounded(self, scores: Scores, layers: list[LayerStructure]) -> str:
        """A sentence on layers whose MLP, or each of whose experts, does not keep a multiple of ``round_to`` channels;
        empty where all do."""
        blocks, left = scores.blocks, []
        kept = dict(zip(blocks.keys, blocks.sum(scores.kept).tolist(), strict=True))
        for view in layers:  # what has no scores is kept whole
            widths = [kept.get((view.index, Block.MLP), view.units(Block.MLP))]
            if (experts := view.experts) is not None:
                every = experts.total * experts.width
                widths.append(kept.get((view.index, Block.EXPERT_CHANNEL), every) // experts.total)
            left += [f"{view.index} ({width})" for width in widths if width % self.round_to]
        if not left:
            return ""
        return (
            f"--model.round_to {self.round_to} does not hold in {len(left)} layers: layer (channels kept) "
            f"{', '.join(left[:5])}{', …' if len(left) > 5 else ''}. They are frozen, narrower than that, not among "
            "--model.units, or the ratio is too low to make them narrower."
        )


def beyond_multiple(scores: Scores, candidates: Flags, budget: Budget) -> Flags:
    """The lowest channels of every layer's MLP that has more of them than a multiple of ``round_to``, bool ``[U]``:
    they are removed first, so that the multiple also holds in a layer that loses nothing else."""
    beyond = np.zeros(len(scores.layer), dtype=bool)
    if budget.round_to == 1:  # nothing is beyond, and ranking millions of units takes seconds
        return beyond
    order, blocks = ranking(scores), scores.blocks
    order = order[candidates[order]]
    mlp = np.array([block is Block.MLP for _, block in blocks.keys])
    many = np.where(mlp & (blocks.size >= budget.round_to), blocks.size % budget.round_to, 0)
    beyond[order] = blocks.rank(order) < many[blocks.ids[order]]
    return beyond


def ranking(scores: Scores) -> Integers:
    """Unit rows, first to be pruned first, int64 ``[U]``: by (score, base score, layer, attention before MLP, unit), so
    units whose prior is zero are ordered by their base score, and no tie depends on the sort's implementation."""
    return np.lexsort((scores.unit, scores.code, scores.layer, scores.base, scores.score))


def best_attention(scores: Scores, layers: list[LayerStructure]) -> list[int]:
    """The row of the GQA group that a hybrid keeps in any case, because transformers cannot decode with a cache of
    mixers alone; none where every layer has attention."""
    if all(Block.ATTENTION in view.parts for view in layers):
        return []
    order = ranking(scores)
    return [int(row) for row in order[scores.of_kind(Block.ATTENTION)[order]][-1:]]


def select_global(scores: Scores, candidates: Flags, budget: Budget) -> Flags:
    """The longest prefix of the ``candidates`` in the ranking whose parameters stay within the budget, bool ``[U]``.

    It ends at the first unit that does not fit. Channels and groups are removed in bundles of ``round_to`` and
    ``groups_multiple_of``; the shortfall is then below one bundle per block.

    Raises:
        UserError: the ratio cannot be reached, or every layer would vanish; names the largest reachable ratio.
    """
    order = ranking(scores)
    order = order[candidates[order]]
    blocks = scores.blocks
    overhead = np.array([budget.overhead.get(key, 0) for key in blocks.keys], dtype=np.int64)
    bundle = np.array([budget.bundle(block) for _, block in blocks.keys])
    if len(order) == len(scores.cost):
        # It could take all units, whatever their order. Refuse what does not leave the dearest bundle: then the shapes
        # alone decide, and the answer before calibration is the answer after it.
        block_cost = blocks.sum(scores.cost)
        last = np.minimum(blocks.size, bundle) * (block_cost // blocks.size) + overhead
        largest = int((block_cost + overhead).sum() - last.max())
        if budget.parameters > largest:
            raise _unreachable(largest, budget)
    # Channels wait for the one that closes their bundle; groups are bundles of one. Everything below is by place in
    # the ranking: where a unit's bundle closes (past the end if never), and what the bundles closed there cost.
    ids, cost, rank = blocks.ids[order], scores.cost[order], blocks.rank(order)
    left = blocks.size[ids] - rank - 1  # in the block once this unit is gone
    closing_rank = rank + left % bundle[ids]
    count = np.bincount(ids, minlength=len(blocks.keys))
    places = np.append(ids.argsort(kind="stable"), len(order))  # of all units, block by block
    start = (count.cumsum() - count)[ids]
    closing = places[np.where(closing_rank < count[ids], start + closing_rank, len(order))]
    price = np.zeros(len(order) + 1, dtype=np.int64)
    np.add.at(price, closing, cost)
    spent = (price[:-1] + np.where(left == 0, overhead[ids], 0)).cumsum()
    stop = int(np.searchsorted(spent, budget.parameters, side="right"))  # the first place that does not fit
    if stop == len(order) and (reached := int(spent[-1]) if len(order) else 0) < budget.parameters:
        raise _unreachable(reached, budget)
    pruned = np.zeros(len(scores.cost), dtype=bool)
    pruned[order[closing < stop]] = True
    return pruned


def select_uniform(scores: Scores, candidates: Flags, budget: Budget) -> Flags:
    """The same share of groups and of channels from every candidate layer, lowest scores first, bool ``[U]``.

    ρ = budget / candidate parameters; each layer loses ⌊K·ρ + ½⌋ GQA groups (fewer if that is too much) and as
    many channels as then fit, so layers of the same widths keep the same widths, and a stock checkpoint stays one.

    Raises:
        UserError: the ratio cannot be reached while every layer keeps one group and one channel.
    """
    blocks = scores.blocks
    first = blocks.ids.argsort(kind="stable")[blocks.size.cumsum() - blocks.size]  # a unit of every block
    costs = dict(zip(blocks.keys, scores.cost[first].tolist(), strict=True))
    units = dict(zip(blocks.keys, blocks.size.tolist(), strict=True))
    free = dict(zip(blocks.keys, blocks.sum(candidates).tolist(), strict=True))
    layers = np.unique(scores.layer[candidates]).tolist()
    sizes = {i: sum(units.get((i, kind), 0) * costs.get((i, kind), 0) for kind in ROLES_OF) for i in layers}
    drops, reachable, reached = dict.fromkeys(blocks.keys, 0), [], True
    for together in _alike(layers, units, free, sizes):
        size = sum(sizes[layer] for layer in together)
        share = budget.parameters * size // sum(sizes.values())
        keys = [[(layer, kind) for layer in together if (layer, kind) in units] for kind in ROLES_OF]
        attention, mlp = (
            (
                max([units[k] for k in of], default=0),
                min([free[k] for k in of], default=0),
                sum(costs[k] for k in of) or 1,
            )
            for of in keys
        )
        counts, largest = _uniform_drops(attention, mlp, share, budget)
        reachable.append(largest * sum(sizes.values()) // size)
        reached &= share <= largest
        drops |= {key: count for of, count in zip(keys, counts, strict=True) for key in of}
    if not reached:
        raise _unreachable(min(reachable), budget)

    order = ranking(scores)
    order = order[candidates[order]]
    drop = np.array([drops[key] for key in blocks.keys])[blocks.ids[order]]
    pruned = np.zeros(len(scores.layer), dtype=bool)
    pruned[order[blocks.rank(order) < drop]] = True
    return pruned


def _alike(
    layers: list[int], units: dict[tuple[int, Block], int], free: dict[tuple[int, Block], int], sizes: dict[int, int]
) -> list[list[int]]:
    """The layers that lose the same together: each by itself, or all where some are larger (hybrids, heads of two
    sizes) and what may lose units is equally wide, so that one width is left."""
    kinds = [kind for kind in ROLES_OF if any(free.get((i, kind)) for i in layers)]
    alike = all(len({units[i, kind] for i in layers if (i, kind) in units}) < 2 for kind in kinds)
    return [layers] if alike and len({sizes[i] for i in layers}) > 1 else [[layer] for layer in layers]


def _uniform_drops(
    attention: tuple[int, int, int], mlp: tuple[int, int, int], share: int, budget: Budget
) -> tuple[tuple[int, int], int]:
    """Groups and channels to remove from a layer, and the most parameters that can be. ``attention``, ``mlp``: units of
    the block, candidates among them, cost of one; ``share``: parameters to remove."""
    (groups, free_groups, group_cost), (channels, free_channels, channel_cost) = attention, mlp
    free_groups, free_channels = (max(0, min(free, all - 1)) for all, free, _ in (attention, mlp))
    round_to, together = budget.round_to, budget.groups_multiple_of
    most_channels = _rounded_down(free_channels, channels, round_to)
    most_groups = free_groups // together * together
    largest = most_groups * group_cost + most_channels * channel_cost
    rho = share / (groups * group_cost + channels * channel_cost)
    most_groups = min(most_groups, share // group_cost // together * together)
    drop_groups = min(int(groups * rho / together + 0.5) * together, most_groups)
    # What the channels cannot give, groups do; and groups make room for the channels beyond a multiple.
    while drop_groups < most_groups and (share - drop_groups * group_cost) // channel_cost > most_channels:
        drop_groups += together
    beyond = channels % round_to if channels >= round_to else 0
    while drop_groups and beyond <= min(most_channels, share // channel_cost):
        if (share - drop_groups * group_cost) // channel_cost >= beyond:
            break
        drop_groups -= together
    wanted = min((share - drop_groups * group_cost) // channel_cost, most_channels)
    return (drop_groups, _rounded_down(wanted, channels, round_to)), largest


def protect_best(scores: Scores, keep: int) -> Flags:
    """Candidates when every block of every layer keeps its ``keep`` highest-scored units, bool ``[U]``."""
    order, blocks = ranking(scores), scores.blocks
    candidates = np.ones(len(scores.layer), dtype=bool)
    candidates[order] = blocks.rank(order) < blocks.size[blocks.ids[order]] - keep
    return candidates


def _rounded_down(drop: int, channels: int, round_to: int) -> int:
    """Largest number ≤ ``drop`` after which a multiple of ``round_to`` channels is kept (0 where there is none)."""
    kept = -(-(channels - drop) // round_to) * round_to
    return max(0, channels - kept)


def _unreachable(reachable: int, budget: Budget) -> UserError:
    largest = int((reachable - budget.added) / budget.total_parameters * 1e4) / 1e4
    return UserError(
        f"--model.pruning_ratio: {float(budget.pruning_ratio):g} cannot be reached with these options. The largest "
        f"reachable ratio is {largest:.4f} of all {budget.total_parameters:,} parameters (embeddings, head and frozen "
        "layers stay). Lower --model.pruning_ratio, or freeze and protect less."
    )


def groups_that_stay(layers: list[LayerStructure], uniform: bool = False) -> str:
    """A sentence, with a space before it, on why no GQA group is a candidate; nothing where groups may be pruned."""
    reason = layers[0].whole_attention
    if uniform and len({view.head_dim for view in layers if Block.ATTENTION in view.parts}) > 1:
        reason = "the same share of two kinds of layers gives them different numbers of query heads"
    return f" GQA groups of this family are not removed: {reason}. MLP channels and whole layers are." if reason else ""
