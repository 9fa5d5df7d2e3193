"""From scores of single weights to scores of what can be removed: sums over the weights of a unit."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_prune.models.families import LayerAnatomy


def group_importance(view: LayerAnatomy, weight_score: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """Importance of every unit of a layer: the sum of a weight score over all weights of the unit.

    Args:
        view: one decoder layer.
        weight_score: role → score of every weight of that projection, shaped like it; asked for one role at a time, so
            that one score matrix is in memory.

    Returns:
        ``[K]`` per GQA group and ``[F]`` per MLP channel, fp32, or fp64 where the scores are.

    A group j is the rows [j·r·d, (j+1)·r·d) of q, [j·d, (j+1)·d) of k and v, and the columns [j·r·d, (j+1)·r·d) of o; a
    channel c is row c of gate and up and column c of down.
    """
    groups = _sum_of_roles(("query", "key", "value", "output"), weight_score, view.num_kv_heads)
    return groups, _sum_of_roles(("gate", "up", "down"), weight_score, view.num_channels)


def _sum_of_roles(roles: tuple[str, ...], weight_score: Callable[[str], Tensor], units: int) -> Tensor:
    total: Tensor | None = None
    for role in roles:
        along: Literal["rows", "columns"] = "columns" if role in ("output", "down") else "rows"
        part = unit_sums(weight_score(role), units, along)
        total = part if total is None else total + part
    assert total is not None
    return total


def _accumulation_dtype(*scores: Tensor) -> torch.dtype:
    return torch.float64 if any(score.dtype == torch.float64 for score in scores) else torch.float32


def unit_sums(scores: Tensor, num_units: int, along: Literal["rows", "columns"]) -> Tensor:
    """Sum the scores of one projection over each unit.

    Args:
        scores: ``[out, in]``; units are contiguous rows (q, k, v, gate, up) or contiguous columns (o, down).
        num_units: K for attention, F for the MLP.
        along: the axis that the units divide.

    Returns:
        ``[num_units]``, float64 where ``scores`` is float64, else float32.
    """
    dtype = _accumulation_dtype(scores)
    if along == "rows":
        return scores.reshape(num_units, -1).sum(1, dtype=dtype)
    return scores.sum(0, dtype=dtype).reshape(num_units, -1).sum(1)
