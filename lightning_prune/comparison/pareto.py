"""Which runs no other run beats in both of two measures."""

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float | None]]) -> list[int]:
    """Positions of the points that no other point beats; of both numbers less is better, None is worst.

    A point is beaten by one that is no worse in both and better in one. Ascending by the first number; points without
    a second one are never on the front.
    """
    known = [(x, y, index) for index, (x, y) in enumerate(points) if y is not None]
    found: list[int] = []
    best = float("inf")
    for x, y, index in sorted(known):
        same = bool(found) and (x, y) == (points[found[-1]][0], points[found[-1]][1])
        if y < best or same:
            found.append(index)
            best = y
    return found
