"""XᵀX as a symmetric product: only the blocks on and above the diagonal are computed, half the work of a full one."""

from torch import Tensor

BLOCK = 1024  # large enough for a matrix product at full speed, small enough that half is really saved
MIRROR_BLOCK = 512  # its squares are copied thrice


def add_gram_(gram: Tensor, rows: Tensor) -> None:
    """Add XᵀX to the upper triangle of ``gram``; what is below the diagonal is undefined until ``mirror_upper_``.

    Args:
        gram: ``[n, n]``, contiguous, overwritten.
        rows: X ``[T, n]`` in the dtype of ``gram``.
    """
    for start in range(0, len(gram), BLOCK):
        stop = start + BLOCK
        gram[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def mirror_upper_(gram: Tensor) -> None:
    """Copy what is above the diagonal of ``gram`` ``[n, n]`` below it, in place and without an n × n temporary."""
    for start in range(0, len(gram), MIRROR_BLOCK):
        stop = start + MIRROR_BLOCK
        square = gram[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        gram[stop:, start:stop] = gram[start:stop, stop:].T
