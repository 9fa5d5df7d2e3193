import itertools
import random

import pytest

from lightning_prune.comparison.pareto import front


def beaten(point: tuple[float, float | None], points: list[tuple[float, float | None]]) -> bool:
    x, y = point
    return y is None or any(
        b is not None and a <= x and b <= y and (a < x or b < y) for a, b in points if (a, b) != point
    )


@pytest.mark.parametrize("seed", range(20))
def test_front_is_what_nothing_beats(seed: int) -> None:
    numbers = random.Random(seed)
    heights = [None, *range(5)]
    points = [(float(numbers.randrange(5)), numbers.choice(heights)) for _ in range(12)]
    assert sorted(front(points)) == [index for index, point in enumerate(points) if not beaten(point, points)]


def test_front_ascends_and_is_empty_without_points() -> None:
    points = [(float(x), float(3 - x)) for x in (2, 0, 1)]
    assert front(points) == [1, 2, 0]
    assert front([]) == front([(1.0, None)]) == []
    assert all(front(list(order)) == [0] for order in itertools.permutations([(1.0, 1.0)]))
