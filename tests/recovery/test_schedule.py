"""The learning rate's shape."""

from itertools import pairwise

import pytest

from lightning_prune.recovery.schedule import cosine_with_warmup


def test_rate_rises_to_the_peak_and_falls_to_zero() -> None:
    rates = [cosine_with_warmup(step / 100, 0.1) for step in range(101)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.5)  # half of what is left behind the warm-up
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert cosine_with_warmup(0, 0) == 1
    assert cosine_with_warmup(1.5, 0.1) == pytest.approx(0, abs=1e-12)  # a step behind the time bound
