"""Shifts of budget between the blocks of layers: directions from coarse to fine, and a search along them.

Scores are multiplied by 2^x, x ``[L, 2]`` for attention and MLP of every layer, before all units are ranked together.
So the ratio is met whatever x is; more in one place is less in another. Directions are the differences between halves
of the depth, halves of the halves and so on (a Haar basis), for both blocks, for each alone, and before all of them
attention against MLP. Kept fractions, which could be shifted instead, would hold for one ratio alone.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BLOCKS = {"both blocks": (1.0, 1.0), "attention": (1.0, 0.0), "MLP": (0.0, 1.0)}
FIRST, LAST = 0.5, 0.0625  # steps in x: factors of 1.41 down to 1.04; what measured scores order is seldom far off


def directions(num_layers: int, attention: bool = True) -> list[tuple[str, Floats]]:
    """Name and signs ``[L, 2]`` of every direction; those of the MLPs alone where no GQA group can go."""
    found = []
    if attention:
        found.append(("attention against MLP", np.tile([1.0, -1.0], (num_layers, 1))))
    spans = [(0, num_layers)]
    while spans:
        spans = [span for span in spans if span[1] - span[0] > 1]
        for start, end in spans:
            middle = (start + end) // 2
            sign = np.zeros((num_layers, 1))
            sign[start:middle], sign[middle:end] = 1, -1
            where = f"{_layers(start, middle)} against {_layers(middle, end)}"
            for block, on in BLOCKS.items():
                if attention or block == "MLP":
                    found.append((f"{block} of {where}", sign * np.array(on)))
        spans = [half for start, end in spans for half in ((start, (start + end) // 2), ((start + end) // 2, end))]
    return found


def search_shifts(
    ways: list[tuple[str, Floats]], loss: Callable[[str, Floats], float], best: float, limit: int
) -> Iterator[tuple[str, Floats, float]]:
    """Go along every direction in turn, forwards or else backwards, and stay where the loss is lower; when a whole
    round found nothing, halve the step. Yields what was tried: its name, x ``[L, 2]`` and the loss.

    Args:
        ways: ``directions``.
        loss: of a move and the x that it leads to.
        best: of x = 0.
        limit: moves to try.
    """
    x, step, tried, better = np.zeros_like(ways[0][1]) if ways else np.zeros((0, 2)), FIRST, 0, True
    while ways and step >= LAST:
        better = False
        for name, signs in ways:
            for sign in (1, -1):
                if tried == limit:
                    return
                there, tried = x + sign * step * signs, tried + 1
                move = f"{'more' if sign > 0 else 'less'} worth by {2**step:.2f}: {name}"
                value = loss(move, there)
                yield move, there, value
                if value < best:
                    x, best, better = there, value, True
                    break
        if not better:
            step /= 2


def factors(x: Floats) -> list[list[float]]:
    """2^x as the option ``block_weights``, to six digits."""
    return [[float(f"{2**value:.6g}") for value in layer] for layer in x.tolist()]


def _layers(start: int, end: int) -> str:
    return f"layer {start}" if end - start == 1 else f"layers {start} to {end - 1}"
