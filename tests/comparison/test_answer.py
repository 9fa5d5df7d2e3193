import pytest

from lightning_prune.comparison.answer import Entry, answer, tiers
from lightning_prune.comparison.repeats import Spread
from lightning_prune.runs.verdict import verdict_word


def entry(
    system: str,
    ratio: float,
    *values: float | None,
    seconds: float | None = 2.0,
    draws: bool = True,
    unigram: float = 400,
) -> Entry:
    """Judged against a dense perplexity of 10: unusable from √(10 · 400) ≈ 63 on."""
    spread = Spread(values)
    return Entry(system, ratio, spread, verdict_word(spread.mean, 10.0, unigram), seconds, draws)


def test_best_at_each_ratio_what_it_cost_and_that_nothing_is_known_about_noise() -> None:
    entries = [
        entry("magnitude", 0.2, 20.0, seconds=0.25, draws=False),
        entry("wanda", 0.2, 12.0),
        entry("taylor", 0.2, 11.0, seconds=9.0),
        entry("wanda", 0.5, 31.0),
        entry("taylor", 0.5, 22.0, seconds=8.0),
    ]
    assert answer(entries, 10.0, "demo") == [
        "By perplexity on demo (dense 10.000), "
        "taylor is best at 20 % (11.000, 1.10 × dense) and 50 % (22.000, 2.20 × dense, badly "
        "degraded).",
        "To calibrate and prune took taylor 9.0 s at 20 % (magnitude, the cheapest that is usable, 0.2 s, for a "
        "perplexity of 20.000); taylor 8.0 s at 50 % (wanda, the cheapest that is usable, 2.0 s, for a perplexity of "
        "31.000).",
        "Nothing was repeated, so nothing is known about noise: a small difference may be chance (--seeds 0 1 2 "
        "tells).",
    ]


def test_order_inside_the_spread_is_a_tie_and_outside_is_not() -> None:
    # Deviations are 1 and 1: √2 = 1.41 is more than 13 − 12 = 1, and less than 15 − 12 = 3.
    near = [entry("wanda", 0.2, 12.0, 13.0, 14.0), entry("taylor", 0.2, 11.0, 12.0, 13.0)]
    far = entry("magnitude", 0.2, 15.0, draws=False)
    quality, _, noise = answer([*near, far], 10.0, "demo")
    assert quality == (
        "By perplexity on demo (dense 10.000), "
        "taylor and wanda tie for the best at 20 % (12.000 ± 1.000, 1.20 × dense; "
        "13.000 ± 1.000, 1.30 × dense)."
    )
    assert noise == (
        "Over 3 calibration seeds, the order of taylor and wanda at 20 % is a tie (differences up to 1.000, spread "
        "1.414)."
    )
    quality, _, noise = answer([near[1], far], 10.0, "demo")
    assert "taylor is best at 20 % (12.000 ± 1.000, 1.20 × dense)" in quality
    assert noise == "Over 3 calibration seeds, the lead at 20 % is larger than the spread."


def test_tie_behind_the_best_is_named_too() -> None:
    entries = [entry("best", 0.2, 10.0, 10.2), entry("b", 0.2, 15.0, 16.0), entry("a", 0.2, 15.0, 15.5)]
    assert [[one.system for one in tier] for tier in tiers(entries)] == [["best"], ["a", "b"]]
    noise = answer(entries, 10.0, "demo")[2]
    assert "the order of a and b at 20 % is a tie (differences up to 0.250, spread 0.791)" in noise
    assert "the lead at 20 % is larger than the spread" in noise


def test_equal_numbers_tie_without_any_repetition() -> None:
    quality, _, noise = answer([entry("a", 0.2, 12.0), entry("b", 0.2, 12.0)], 10.0, "demo")
    assert "a and b tie for the best at 20 %" in quality
    assert noise.startswith("Nothing was repeated")


def test_unusable_system_is_never_best_nor_cheapest() -> None:
    entries = [
        entry("broken", 0.5, None, seconds=0.1),
        entry("lost", 0.5, 99.0, seconds=0.1),
        entry("wanda", 0.5, 31.0),
    ]
    quality, cost, _ = answer(entries, 10.0, "demo")
    assert "wanda is best at 50 % (31.000, 3.10 × dense, badly degraded)" in quality
    assert cost == "To calibrate and prune took wanda 2.0 s at 50 %."
    quality, cost, _ = answer(entries[:2], 10.0, "demo")
    assert quality == "By perplexity on demo (dense 10.000), every system is unusable at 50 %."
    assert cost == "What that cost does not matter: nothing is usable."
    noise = answer([entry("lost", 0.5, 99.0, 98.0), entry("broken", 0.5, None, 12.0)], 10.0, "demo")[2]
    assert noise == "Over 2 calibration seeds, at 50 % there is no usable system to compare."


def test_one_system_is_not_called_best() -> None:
    quality, cost, noise = answer([entry("wanda", 0.2, 12.0, 14.0), entry("wanda", 0.5, 99.0, 98.0)], 10.0, "demo")
    assert quality == (
        "By perplexity on demo (dense 10.000), "
        "there is only wanda to judge: it was run at 20 % (13.000 ± 1.414, 1.30 × dense); it "
        "is unusable at 50 %."
    )
    assert cost == "To calibrate and prune took wanda 2.0 s at 20 %."
    assert "wanda at 20 % varies by ± 1.414" in noise


def test_ratio_that_only_one_of_several_systems_has_is_no_contest() -> None:
    quality = answer([entry("a", 0.2, 12.0), entry("b", 0.2, 13.0), entry("a", 0.5, 22.0)], 10.0, "demo")[0]
    assert "a is best at 20 %" in quality
    assert "only a was run at 50 % (22.000" in quality


def test_without_a_dense_number_nothing_is_said_about_the_distance() -> None:
    assert answer([entry("a", 0.2, 12.0), entry("b", 0.2, 13.0)], None, "demo")[0] == (
        "By perplexity on demo (the dense perplexity is not finite), a is best at 20 % (12.000)."
    )


def test_methods_that_draw_nothing_have_no_noise_of_seeds() -> None:
    noise = answer([entry("magnitude", 0.2, 12.0, draws=False)], 10.0, "demo")[2]
    assert noise.startswith("No calibration samples were drawn")


def test_unknown_seconds_are_not_called_cheap() -> None:
    cost = answer([entry("a", 0.2, 12.0, seconds=None), entry("b", 0.2, 13.0, seconds=3.0)], 10.0, "demo")[1]
    assert cost == (
        "To calibrate and prune took a (seconds not recorded) at 20 % (b, the cheapest that is usable, 3.0 s, for a "
        "perplexity of 13.000)."
    )


def test_nothing_to_rank_is_said() -> None:
    assert answer([], 10.0, "demo") == ["Nothing here may be ranked: no run reached its ratio and was evaluated."]


@pytest.mark.parametrize("values", [(1.0,), (1.0, None), (None,), (float("inf"), 2.0)])
def test_deviation_needs_two_finite_values(values: tuple[float | None, ...]) -> None:
    assert Spread(values).deviation is None
