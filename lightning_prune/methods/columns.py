"""Columns of the projections that write to the residual stream, and errors that name such a projection."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def columns_of(units: Tensor, width: int) -> Tensor:
    """Columns of units ``[U]`` that are ``width`` columns each, int64 ``[U·width]``."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def in_columns(columns: Tensor, part: Tensor, like: Tensor) -> Tensor:
    """``part`` in these columns of a matrix of the shape and dtype of ``like``, zero elsewhere.

    Raises:
        FloatingPointError: it is not finite in that dtype.
    """
    whole = torch.zeros_like(like)
    whole[:, columns] = part.to(whole.dtype)
    if not bool(torch.isfinite(whole).all()):
        raise FloatingPointError(f"refitted weights overflow {str(whole.dtype).removeprefix('torch.')}.")
    return whole


@contextmanager
def named(where: str) -> Iterator[None]:
    """Put ``where`` in front of the message of a FloatingPointError."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{where}: {error}") from None
