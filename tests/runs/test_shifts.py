"""Directions that span all shifts, and a search that finds the best one."""

import numpy as np
import pytest

from lightning_prune.runs.shifts import directions, factors, search_shifts


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("attention", [True, False])
def test_directions_span_every_shift_but_the_one_that_changes_nothing(layers: int, attention: bool) -> None:
    ways = directions(layers, attention)
    signs = np.array([sign.ravel() for _, sign in ways] or [np.zeros(2 * layers)])
    pieces = 2 * layers if attention else layers
    same = np.ones((layers, 2)) if attention else np.tile([0.0, 1.0], (layers, 1))
    assert np.linalg.matrix_rank(np.vstack([signs, same.ravel()])) == pieces
    assert len({name for name, _ in ways}) == len(ways)


def test_search_finds_the_known_optimum_and_keeps_to_its_limit() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(4, 2))

    def loss(move: str, x: np.ndarray) -> float:  # a shift of all blocks alike changes nothing
        away = (x - x.mean()) - (wanted - wanted.mean())
        return float(np.square(away).sum())

    start = loss("", np.zeros((4, 2)))
    tried = list(search_shifts(directions(4), loss, start, 2000))
    assert min(value for _, _, value in tried) < 0.02 * start
    assert len(list(search_shifts(directions(4), loss, start, 7))) == 7
    best = start
    for _, x, value in tried:  # every move starts from the best so far
        assert value == loss("", x)
        best = min(best, value)


def test_factors_are_powers_of_two_per_layer_and_block() -> None:
    assert factors(np.array([[0.0, 1.0], [-1.0, 0.5]])) == [[1.0, 2.0], [0.5, 1.41421]]
