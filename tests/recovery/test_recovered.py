"""The share of the loss that training gave back."""

import math

import pytest

from lightning_prune.runs.recovered import regained, share


def test_regained_is_a_share_of_the_lost_log_perplexity() -> None:
    # 10 → 40 doubles twice; 20 is one doubling back.
    assert regained(10, 40, 20) == pytest.approx(0.5)
    assert regained(10, 40, 10) == pytest.approx(1)
    assert regained(10, 40, 80) == pytest.approx(-0.5)
    assert share(regained(10, 40, 20)) == "50%"


@pytest.mark.parametrize("values", [(10, 10, 9), (10, 9, 8), (None, 40, 20), (10, None, 20), (10, 40, math.inf)])
def test_where_nothing_was_lost_or_known_there_is_no_share(values: tuple[float | None, ...]) -> None:
    assert regained(*values) is None
    assert share(regained(*values)) == "–"
