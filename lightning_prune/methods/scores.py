"""Score tables from importances: one row per prunable unit."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_prune.checkpoint.scores import BLOCKS, Floats, Integers, Scores
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import Block


def group_scores(
    layers: Sequence[LayerStructure],
    importance: Sequence[Mapping[Block, Tensor]] | None = None,
    kinds: Collection[Block] = (Block.ATTENTION, Block.MLP),
) -> Scores:
    """Scores of all groups before any prior: importance / cost.

    Args:
        layers: of the dense model.
        importance: of every layer, per GQA group ``[K]`` and per channel ``[F]``. None: 1 everywhere.
        kinds: of units that have a row.

    Raises:
        FloatingPointError: an importance is NaN or infinite; the message names layer and block.
    """
    parts = []
    for position, view in enumerate(layers):
        for block in filter(kinds.__contains__, view.scored):
            values = torch.ones(view.units(block)) if importance is None else importance[position][block]
            if bad := int((~torch.isfinite(values)).sum()):
                raise FloatingPointError(f"layer {view.index}, {block}: {bad} importances are NaN or infinite.")
            parts.append((view.index, block, values.detach().cpu().double().numpy(), view.unit_cost(block)))
    layer, block, values, cost = zip(*parts, strict=True)
    count = [len(one) for one in values]
    code = np.repeat([BLOCKS.index(one) for one in block], count)
    unit = np.concatenate([np.arange(units) for units in count])
    return _table(np.repeat(layer, count), code, unit, np.concatenate(values), np.repeat(cost, count))


def layer_scores(importance: Tensor, cost: Sequence[int]) -> Scores:
    """Scores of whole layers (depth pruning): score = importance ``[L]``, cost in parameters per layer."""
    values, count = importance.cpu().double().numpy(), len(cost)
    scores = _table(
        np.arange(count), np.full(count, BLOCKS.index(Block.LAYER)), np.zeros(count, np.int64), values, np.array(cost)
    )
    return replace(scores, score=values, base=values)


def _table(layer: Integers, code: Integers, unit: Integers, importance: Floats, cost: Integers) -> Scores:
    base = importance / cost
    return Scores(layer, code, unit, importance, cost, np.ones(len(cost)), base, np.zeros(len(cost), bool), base)
