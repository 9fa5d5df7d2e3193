import math

import pytest

from lightning_prune.runs.verdict import (
    LEGEND,
    evaluation_section,
    summary_table,
    verdict,
    verdict_word,
)


@pytest.mark.parametrize(
    ("pruned", "dense", "unigram", "expected"),
    [
        (9.0, 10.0, 1e6, "near dense"),  # pruning can help on a set the model has overfitted
        (11.0, 10.0, 1e6, "near dense"),
        (11.01, 10.0, 1e6, "degraded"),
        (20.0, 10.0, 1e6, "degraded"),  # one bit per token
        (20.01, 10.0, 1e6, "badly degraded"),
        (99.9, 10.0, 1000.0, "badly degraded"),
        (100.0, 10.0, 1000.0, "unusable"),  # ln 10 of the ln 100 that context was worth
        (1e9, 10.0, None, "badly degraded"),  # not known to be worse than chance
        (299.9, 300.0, 300.0, "not comparable"),  # the dense model is no better than chance itself
        (800.0, 400.0, 300.0, "not comparable"),
        (800.1, 400.0, 300.0, "unusable"),
        (12.0, 10.0, 13.0, "unusable"),  # little was known from context, and more than half of it is gone
    ],
)
def test_words_follow_the_stated_thresholds(pruned: float, dense: float, unigram: float | None, expected: str) -> None:
    assert verdict_word(pruned, dense, unigram) == expected


@pytest.mark.parametrize(
    ("pruned", "unigram", "divergence", "expected"),
    [
        (10.0, 1e6, 0.0, "near dense"),
        (10.0, 1e6, 0.095, "near dense"),  # e^0.095 = 1.0997
        (10.0, 1e6, 0.096, "degraded"),  # another model, though as good a one
        (20.5, 1e6, 0.3, "badly degraded"),  # the worse of both
        (10.0, 1e6, 0.7, "badly degraded"),
        (10.0, 1000.0, 2.31, "unusable"),  # ln 10 of the ln 100 that context was worth
        (10.0, None, 1e9, "badly degraded"),
        (10.0, 1e6, math.inf, "unusable"),
    ],
)
def test_divergence_counts_as_the_perplexity_on_text_of_the_dense_model(
    pruned: float, unigram: float | None, divergence: float, expected: str
) -> None:
    assert verdict_word(pruned, 10.0, unigram, divergence) == expected
    finite = None if divergence == math.inf else divergence
    metrics = {
        "perplexity": {"a": {"dense": 10.0, "pruned": pruned, "tokens": 10}},
        "evaluation": {"a": {"unigram_perplexity": unigram}},
        "distance": {"a": {"kl_divergence": finite, "top1_agreement": 0.5, "expected_acceptance": 0.25}},
    }
    assert verdict(metrics, "a").startswith(expected)
    assert ("not finite" if finite is None else f"| {divergence:.4f} | 50% |") in evaluation_section(metrics)


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf")])
def test_what_is_not_finite_is_unusable_or_not_comparable(nothing: float | None) -> None:
    for dense in (nothing, 5.0):
        assert verdict_word(100.0, dense, 100.0) == "unusable"  # no better than token frequencies
        assert verdict_word(nothing, dense, None) == "unusable"
    assert verdict_word(99.9, nothing, 100.0) == "not comparable"
    metrics = {"perplexity": {"a": {"dense": nothing, "pruned": 9.0, "tokens": 10}}, "evaluation": {"a": {}}}
    assert verdict(metrics, "a") == "not comparable (the dense perplexity is not finite)"
    assert "| a | 10 | not finite | 9.000 |" in evaluation_section(metrics)


def test_card_says_in_words_whether_the_model_can_be_used() -> None:
    perplexity = {
        "near": {"dense": 5.0, "pruned": 5.25, "tokens": 1000},
        "half": {"dense": 5.0, "pruned": 125.0, "tokens": 1000},
        "bad": {"dense": 5.0, "pruned": 500.0, "tokens": 2000},
        "broken": {"dense": 5.0, "pruned": None, "tokens": 10},
        "a|b<script>": {"dense": 5.0, "pruned": 6.5, "tokens": 1},
    }
    metrics = {"perplexity": perplexity, "evaluation": {name: {"unigram_perplexity": 300.0} for name in perplexity}}
    assert verdict(metrics, "near") == "near dense (1.05 times the dense perplexity)"
    lost = math.log(125 / 5) / math.log(300 / 5)
    assert verdict(metrics, "half") == (
        f"unusable (25.00 times the dense perplexity: {100 * lost:.0f}% of the way from the dense model to token "
        "frequencies)"
    )
    card = evaluation_section(metrics)
    assert "| near | 1,000 | 5.000 | 5.250 | near dense (1.05 times the dense perplexity) |" in card
    assert "| 500.000 | unusable (no better than token frequencies alone, perplexity 300.0) |" in card
    assert "| broken | 10 | 5.000 | not finite | unusable (perplexity is not finite) |" in card
    assert "| a\\|b&lt;script&gt; | 1 |" in card
    assert LEGEND in card
    assert evaluation_section({"perplexity": {}}) == ""


def test_summary_says_what_was_pruned_and_what_that_did() -> None:
    metrics = {
        "perplexity": {"wikitext2": {"dense": 12.3456, "pruned": 15.0, "tokens": 4242}},
        "evaluation": {"wikitext2": {"split": "test", "seq_len": 128}},
        "parameters": {"dense": 1_234_567, "pruned": 987_900},
        "pruning_ratio": {"requested": 0.2, "achieved": 0.1998},
        "footprint": {
            side: {"file_bytes": size, "memory_bytes": {2048: size, 32768: memory}, "flops_per_token": flops}
            for side, size, memory, flops in (("dense", 2_500_000, 4 * 10**9, 10), ("pruned", 2_000_000, 3 * 10**9, 8))
        },
        "seconds": {"calibrate": 1.235, "total": 20.0},
        "peak_memory_bytes": 3 * 2**20,
    }
    table = summary_table("my wanda", metrics)
    words = ["my wanda", "1,234,567 → 987,900", "requested 0.2000, achieved 0.1998", "dense 12.346, pruned 15.000"]
    words += ["(4,242 tokens of the test split in windows of 128)", "calibrate 1.2", "3 MiB"]
    words += ["2.5 MB → 2.0 MB", "4.00 GB → 3.00 GB at 32,768 tokens", "80% of the dense model's"]
    assert [word for word in words if word not in table] == []
    assert "the next removal" not in table
    assert "pruned before" not in table
    again = summary_table("my wanda", metrics | {"method": {"history": "llama → flap"}})
    assert "pruned before         llama → flap; 'dense' below is what that left" in again
    metrics["pruning_ratio"] = {"requested": 0.2, "achieved": 0.15}  # of experts, which are removed in steps
    assert "achieved 0.1500, since the next removal would exceed" in summary_table("reap", metrics)
    metrics["pruning_ratio"] = {"requested": None, "achieved": 0.1998}
    metrics["perplexity"]["wikitext2"]["pruned"] = float("inf")
    table = summary_table("shortgpt", metrics)
    assert "pruned inf" in table
    assert "pruning ratio         achieved 0.1998" in table


def test_summary_says_what_a_target_reached_and_where_long_windows_say_little() -> None:
    metrics = {
        "perplexity": {
            name: {"dense": dense, "pruned": 30.0, "tokens": 99} for name, dense in (("a", 20.0), ("a@8", 50.0))
        },
        "evaluation": {"a": {"seq_len": 4}, "a@8": {"seq_len": 8, "long_windows_of": "a"}},
        "parameters": {"dense": 10, "pruned": 8},
        "pruning_ratio": {"requested": None, "achieved": 0.2},
        "target": {"kind": "memory", "limit": 9_400_000, "reached": 9_300_000, "context": 1024, "batch": 2},
        "seconds": {},
        "peak_memory_bytes": 1,
    }
    table = summary_table("wanda", metrics)
    assert "at most 9.4 MB (9.0 MiB), reached 9.3 MB (8.9 MiB) (weights and KV cache of 2 × 1,024 tokens)" in table
    assert table.count("2.5 times worse in these longer windows") == 1
    metrics["target"] = {"kind": "active_parameters", "limit": 9, "reached": 8, "context": 1, "batch": 1}
    metrics["perplexity"]["a@8"]["dense"] = 23.9  # type: ignore[index]
    table = summary_table("wanda", metrics)
    assert "at most 9, reached 8 (active parameters)" in table
    assert "longer windows" not in table
