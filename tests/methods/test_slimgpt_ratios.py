import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from lightning_prune.methods.slimgpt_ratios import layer_ratios, unit_counts


def test_twenty_percent_of_32_layers_is_the_published_profile() -> None:
    ratios = layer_ratios(32, 0.2)
    assert ratios[0] == pytest.approx(0.0625)
    assert ratios[-1] == pytest.approx(0.25, abs=2e-3)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 24, 80])
@pytest.mark.parametrize("target", [0.0, 0.05, 0.2, 0.5, 0.8, 0.95])
def test_the_mean_is_the_target_and_later_layers_lose_more(num_layers: int, target: float) -> None:
    ratios = layer_ratios(num_layers, target)
    assert len(ratios) == num_layers
    assert math.fsum(ratios) / num_layers == pytest.approx(target, abs=1e-12)
    assert all(a <= b + 1e-12 for a, b in pairwise(ratios))
    assert min(ratios) >= 0
    assert max(ratios) <= 0.95 + 1e-12


def test_the_profile_is_logarithmic_and_its_first_ratio_rises_where_the_last_would_exceed_the_limit() -> None:
    for target, first, last in ((0.3, 0.1, None), (0.7, 0.0, 0.95)):
        ratios = layer_ratios(6, target, first_ratio=first)
        slope = (ratios[5] - ratios[0]) / math.log(6)
        assert ratios == pytest.approx([ratios[0] + slope * math.log(i + 1) for i in range(6)])
        assert math.fsum(ratios) / 6 == pytest.approx(target)
        assert ratios[0] == first if last is None else ratios[-1] == pytest.approx(last)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: layer_ratios(8, 0.96), r"0\.9600.*0\.9500"),  # the largest mean
        (lambda: layer_ratios(8, 0.1, first_ratio=0.9), r"first_ratio 0\.9"),  # the last would be negative
        (lambda: unit_counts([0.95, 0.95], [4, 4], [8, 8], 100, 10, 750), "at most 740"),  # one of each is kept
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_counts_meet_the_budget_to_less_than_one_channel() -> None:
    rng = random.Random(0)
    for _ in range(300):
        layers, groups, channels = rng.randint(1, 12), rng.choice([2, 4, 8, 32]), rng.choice([40, 192, 512])
        width = rng.choice([16, 64])
        channel = 3 * width
        group = rng.choice([1, 4]) * 4 * width
        target = rng.uniform(0.02, 0.7)
        budget = int(target * layers * (groups * group + channels * channel))
        units = [groups] * layers, [channels] * layers
        counts = unit_counts(layer_ratios(layers, target), *units, group, channel, budget)
        assert 0 <= budget - sum(g * group + c * channel for g, c in counts) < channel
        assert all(0 <= g <= groups - 1 and 0 <= c <= channels - 1 for g, c in counts)


@pytest.mark.parametrize(
    ("ratios", "units", "cost", "budget", "expected"),
    [
        ([0.25, 0.5], (4, 8), (100, 10), 360, [(1, 2), (2, 4)]),  # exact: left alone
        ([0.25, 0.5], (4, 8), (100, 10), 370, [(1, 2), (2, 5)]),  # the largest ratio is corrected first
        ([0.25, 0.5], (4, 8), (100, 10), 385, [(1, 3), (2, 5)]),
        ([0.25, 0.5], (4, 8), (100, 10), 359, [(1, 2), (2, 3)]),
        ([0.5, 0.5], (4, 8), (100, 10), 490, [(2, 5), (2, 4)]),
        ([0.125], (4, 40), (100, 10), 150, [(1, 5)]),  # halves round up
        ([0.0, 0.5], (4, 8), (100, 10), 260, [(0, 0), (2, 6)]),  # a layer with ratio zero loses nothing
        ([0.25, 0.3], (2, 10), (100, 1), 104, [(0, 2), (1, 2)]),  # a group is given back: no channels weigh as much
        ([0.4, 0.4], (4, 4), (100, 10), 430, [(2, 1), (2, 2)]),  # another group: no channel is left
        ([0.95, 0.95], (4, 8), (100, 10), 740, [(3, 7), (3, 7)]),  # a group and a channel stay everywhere
    ],
)
def test_counts_by_hand(ratios: list[float], units: tuple, cost: tuple, budget: int, expected: list) -> None:
    assert unit_counts(ratios, *([count] * len(ratios) for count in units), *cost, budget) == expected
