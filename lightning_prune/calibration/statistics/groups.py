"""From scores of single weights to scores of what can be removed: sums over the weights of a unit."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import OUTPUT_ROLE, Block


def group_importance(view: LayerStructure, weight_score: Callable[[str], Tensor]) -> dict[Block, Tensor]:
    """Importance of every unit of a layer: the sum of a weight score over all weights of the unit.

    ``weight_score``: role → score of every weight of that projection, shaped like it; requested one role at a time, so
    that one score matrix is in memory. Returns ``[K]`` per GQA group (attention) and ``[F]`` per channel (mlp), fp32,
    or fp64 where the scores are.

    A group j is the rows [j·r·d, (j+1)·r·d) of q, [j·d, (j+1)·d) of k and v, and the columns [j·r·d, (j+1)·r·d) of o; a
    channel c is row c of gate and up and column c of down.
    """
    importance: dict[Block, Tensor] = {}
    for block in view.prunable:
        for role in view.parts[block].linears:
            scores, units = weight_score(role), view.units(block)
            dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
            if not units:  # a block that an earlier pruning took out
                part = scores.new_zeros(0, dtype=dtype)
            elif role == OUTPUT_ROLE[block]:
                part = scores.sum(0, dtype=dtype).reshape(units, -1).sum(1)
            else:
                part = scores.reshape(units, -1).sum(1, dtype=dtype)
            del scores  # before the next one is made
            importance[block] = importance[block] + part if block in importance else part
    return importance
