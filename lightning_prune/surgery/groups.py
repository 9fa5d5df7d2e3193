"""From scores of single weights to scores of what can be removed: sums over the weights of a unit."""

from typing import Literal

import torch
from torch import Tensor


def attention_group_sums(query: Tensor, key: Tensor, value: Tensor, output: Tensor, num_kv_heads: int) -> Tensor:
    """Sum weight scores S over each GQA group.

    sums[j] = Σ S_q[j·r·d : (j+1)·r·d, :] + Σ S_k[j·d : (j+1)·d, :] + Σ S_v[j·d : (j+1)·d, :]
              + Σ S_o[:, j·r·d : (j+1)·r·d]

    Args:
        query: ``[K·r·d, D]``, any float dtype, like the other three.
        key: ``[K·d, D]``.
        value: ``[K·d, D]``.
        output: ``[D, K·r·d]``.
        num_kv_heads: K. KV head j serves the contiguous query heads j·r … j·r + r − 1.

    Returns:
        ``[K]``, float64 where an input is float64, else float32 (also the accumulation's dtype).
    """
    dtype = _accumulation_dtype(query, key, value, output)
    rows = sum(matrix.reshape(num_kv_heads, -1).sum(1, dtype=dtype) for matrix in (query, key, value))
    return rows + output.sum(0, dtype=dtype).reshape(num_kv_heads, -1).sum(1)


def mlp_channel_sums(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Sum weight scores S over each intermediate channel.

    sums[c] = Σ S_gate[c, :] + Σ S_up[c, :] + Σ S_down[:, c]

    Args:
        gate: ``[F, D]``, any float dtype, like the other two.
        up: ``[F, D]``.
        down: ``[D, F]``.

    Returns:
        ``[F]``, float64 where an input is float64, else float32 (also the accumulation's dtype).
    """
    dtype = _accumulation_dtype(gate, up, down)
    return gate.sum(1, dtype=dtype) + up.sum(1, dtype=dtype) + down.sum(0, dtype=dtype)


def _accumulation_dtype(*scores: Tensor) -> torch.dtype:
    return torch.float64 if any(score.dtype == torch.float64 for score in scores) else torch.float32


def unit_sums(scores: Tensor, num_units: int, along: Literal["rows", "columns"]) -> Tensor:
    """Sum the scores of one projection over each unit.

    Args:
        scores: ``[out, in]``; units are contiguous rows (q, k, v, gate, up) or contiguous columns (o, down).
        num_units: K for attention, F for the MLP.
        along: the axis that the units divide.

    Returns:
        ``[num_units]`` in the dtype of ``scores``.
    """
    if along == "rows":
        return scores.reshape(num_units, -1).sum(1)
    return scores.sum(0).reshape(num_units, -1).sum(1)
