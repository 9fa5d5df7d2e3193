"""How much of the dense model is left, in words and their thresholds, and what training gave back of the rest."""

import math
from typing import Any, TypeGuard

from lightning_prune.support.escape import markdown, markdown_table, public_name

NEAR_DENSE, DEGRADED, BADLY_DEGRADED, UNUSABLE = "near dense", "degraded", "badly degraded", "unusable"
UNKNOWN = "not comparable"  # the dense perplexity is missing, and the pruned one is better than token frequencies
# Within a family of models, halving the size costs about a tenth (Llama 13B to 7B: 12 % on WikiText-2).
NEAR = 1.1
BIT = 2.0  # one bit per token
LEAST = 0.01  # nats: a share of what is lost to rounding means nothing
LEGEND = (
    f"Verdict: {NEAR_DENSE} up to {NEAR:g} times the dense perplexity (about what halving a model's size costs), "
    f"{DEGRADED} up to {BIT:g} times (one bit per token lost), {BADLY_DEGRADED} above. {UNUSABLE.capitalize()}, "
    "whatever the ratio: at least half of what the dense model gains over token frequencies without context is lost "
    "(perplexity at or above √(dense × unigram)), or the perplexity is not finite."
)


def verdict_word(pruned: float | None, dense: float | None, unigram: float | None) -> str:
    """One word of the scale in ``LEGEND``.

    A language model's gain is ln(unigram) - ln(dense) nats per token, what it knows from context. The loss from
    pruning is ln(pruned) - ln(dense).

    Perplexities are of the pruned, the dense and the unigram model on the same tokens. None, NaN and infinity: it was
    not finite, or (unigram) is not known. Without the dense one only the unigram model is left to compare with.
    """
    limit = unusable_limit(dense, unigram)
    if not _finite(pruned) or (limit is not None and pruned >= limit):
        return UNUSABLE
    if not _finite(dense):
        return UNKNOWN
    ratio = pruned / dense
    return NEAR_DENSE if ratio <= NEAR else DEGRADED if ratio <= BIT else BADLY_DEGRADED


def unusable_limit(dense: float | None, unigram: float | None) -> float | None:
    """The perplexity from which on a pruned model is unusable; None where the unigram model's is not known."""
    if not _finite(unigram):
        return None
    return min(unigram, math.sqrt(dense * unigram)) if _finite(dense) else unigram


def verdict(metrics: dict[str, Any], name: str) -> str:
    """The word and its reason, for one evaluation set of a ``metrics.json``."""
    pruned, dense = metrics["perplexity"][name]["pruned"], metrics["perplexity"][name]["dense"]
    unigram = metrics.get("evaluation", {}).get(name, {}).get("unigram_perplexity")
    word = verdict_word(pruned, dense, unigram)
    if not _finite(pruned):
        return f"{word} (perplexity is not finite)"
    if _finite(unigram) and pruned >= unigram:
        return f"{word} (no better than token frequencies alone, perplexity {unigram:.1f})"
    if not _finite(dense):
        return f"{word} (the dense perplexity is not finite)"
    reason = f"{pruned / dense:.2f} times the dense perplexity"
    if word == UNUSABLE:
        lost = math.log(pruned / dense) / math.log(unigram / dense)
        reason += f", {lost:.0%} of what the dense model gains over token frequencies is lost"
    return f"{word} ({reason})"


def evaluation_section(metrics: dict[str, Any]) -> str:
    """The model card's section on how good the pruned model is; empty when nothing was evaluated."""
    if not metrics["perplexity"]:
        return ""
    rows = []
    for name, item in metrics["perplexity"].items():
        both = [f"{value:.3f}" if _finite(value) else "not finite" for value in (item["dense"], item["pruned"])]
        rows.append((markdown(public_name(name)), f"{item['tokens']:,}", *both, verdict(metrics, name)))
    header = ("Set", "Tokens", "Dense perplexity", "Pruned perplexity", "Verdict")
    return "\n" + "\n\n".join(["## Evaluation", markdown_table(header, rows), LEGEND]) + "\n"


def regained(dense: float | None, pruned: float | None, recovered: float | None) -> float | None:
    """Share of the lost log-perplexity that training gave back: 0 nothing, 1 all; None where less than ``LEAST`` nats
    were lost.

    (ln pruned − ln recovered) / (ln pruned − ln dense).
    """
    if not (_finite(dense) and _finite(pruned) and _finite(recovered)):
        return None
    lost = math.log(pruned / dense)
    return math.log(pruned / recovered) / lost if lost >= LEAST else None


def share(value: float | None) -> str:
    """As a table says it."""
    return "–" if value is None else f"{value:.0%}"


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
