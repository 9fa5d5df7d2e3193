import pytest

from lightning_prune.reporting.verdict import evaluation_section, is_unusable, verdict


@pytest.mark.parametrize(
    ("perplexity", "unigram", "expected"),
    [
        (99.9, 100.0, False),
        (100.0, 100.0, True),
        (None, None, True),
        (float("inf"), None, True),
        (float("nan"), 100.0, True),
        (1e9, None, False),  # not known to be worse than chance
    ],
)
def test_model_no_better_than_token_frequencies_is_unusable(
    perplexity: float | None, unigram: float | None, expected: bool
) -> None:
    assert is_unusable(perplexity, unigram) is expected


def test_card_says_in_words_whether_the_model_can_be_used() -> None:
    perplexity = {
        "good": {"dense": 5.0, "pruned": 6.5, "tokens": 1000},
        "bad": {"dense": 5.0, "pruned": 500.0, "tokens": 2000},
        "broken": {"dense": 5.0, "pruned": None, "tokens": 10},
    }
    metrics = {"perplexity": perplexity, "evaluation": {name: {"unigram_perplexity": 300.0} for name in perplexity}}
    assert verdict(metrics, "good") == "usable"
    card = evaluation_section(metrics)
    assert "| good | 1,000 | 5.000 | 6.500 | usable |" in card
    assert (
        "| bad | 2,000 | 5.000 | 500.000 | unusable (no better than token frequencies alone, perplexity 300.0) |"
        in card
    )
    assert "| broken | 10 | 5.000 | not finite | unusable (perplexity is not finite) |" in card
    assert evaluation_section({"perplexity": {}}) == ""
