"""Scores of single weights → which of them are zeroed: a share of a row or a tensor, or n kept of every m."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from lightning_prune.support.errors import UserError


@dataclass(frozen=True)
class Structure:
    """What is removed: whole groups, single weights, or single weights so that n of every m inputs of a row stay."""

    kind: Literal["group", "unstructured", "n:m"]
    n: int = 0
    m: int = 0


def parse_structure(text: str) -> Structure:
    """``group``, ``unstructured``, or ``n:m`` such as 2:4 and 4:8, which keeps n of every m.

    Raises:
        UserError: anything else, or not 0 < n < m.
    """
    if text == "group":
        return Structure("group")
    if text == "unstructured":
        return Structure("unstructured")
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match and 0 < int(match[1]) < int(match[2]):
        return Structure("n:m", int(match[1]), int(match[2]))
    raise UserError(
        f"--model.structure: '{text}' is not known. Allowed: group, unstructured, or n:m with 0 < n < m (keep n of "
        "every m inputs), for example 2:4 or 4:8."
    )


def keep_n_of_m_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Prune the m − n lowest of every m consecutive inputs of a row; bool ``[out, in]``, True = pruned.

    Args:
        scores: ``[out, in]``, any floating dtype; compared in fp32 or better. Ties: the lower index goes first.

    Raises:
        UserError: ``in`` is not a multiple of m.
        FloatingPointError: a score is NaN.
    """
    rows, columns = scores.shape
    if columns % m:
        raise UserError(
            f"--model.structure {n}:{m} needs input widths divisible by {m}, found a linear with {columns} inputs. Use "
            "another n:m or --model.structure unstructured."
        )
    return _lowest(scores.reshape(rows, columns // m, m), m - n).reshape(rows, columns)


def row_mask(scores: Tensor, fraction: float) -> Tensor:
    """Prune exactly ⌊in · fraction⌋ lowest of each row of ``[out, in]`` (Wanda's comparison set); True = pruned.

    Raises:
        FloatingPointError: a score is NaN.
    """
    return _lowest(scores, share(scores.shape[1], fraction))


def tensor_mask(scores: Tensor, fraction: float) -> Tensor:
    """Prune exactly ⌊size · fraction⌋ lowest of the whole tensor (magnitude's comparison set); True = pruned.

    The released baseline prunes everything up to a threshold, one weight more.

    Raises:
        FloatingPointError: a score is NaN.
    """
    return _lowest(scores.flatten(), share(scores.numel(), fraction)).reshape(scores.shape)


def share(size: int, fraction: float) -> int:
    """⌊size · fraction⌋ of the decimal that was written: 0.29 of 100 is 29, though floats say 28.999…"""
    return math.floor(size * Fraction(str(fraction)))


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Mark the ``count`` lowest along the last dimension; stable, so among equals the lower index is marked."""
    if bool(scores.isnan().any()):
        raise FloatingPointError("a score is NaN.")
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    lowest = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, lowest, True)
