"""Whether a pruned model is still of any use, in words."""

import math
from typing import Any


def is_unusable(perplexity: float | None, unigram_perplexity: float | None) -> bool:
    """True when the model predicts no better than the token frequencies alone, or its perplexity is not finite.

    Args:
        perplexity: of the pruned model; None stands for a value that was not finite when it was written.
        unigram_perplexity: of the unigram model on the same tokens; None where it is not known.
    """
    if perplexity is None or not math.isfinite(perplexity):
        return True
    return unigram_perplexity is not None and perplexity >= unigram_perplexity


def verdict(metrics: dict[str, Any], name: str) -> str:
    """``usable`` or ``unusable (…)`` with the reason, for one evaluation set of a ``metrics.json``."""
    perplexity = metrics["perplexity"][name]["pruned"]
    unigram = metrics.get("evaluation", {}).get(name, {}).get("unigram_perplexity")
    if not is_unusable(perplexity, unigram):
        return "usable"
    if perplexity is None or not math.isfinite(perplexity):
        return "unusable (perplexity is not finite)"
    return f"unusable (no better than token frequencies alone, perplexity {unigram:.1f})"


def evaluation_section(metrics: dict[str, Any]) -> str:
    """The model card's section on how good the pruned model is; empty when nothing was evaluated."""
    if not metrics["perplexity"]:
        return ""
    lines = ["## Evaluation", "", "| Set | Tokens | Dense perplexity | Pruned perplexity | Verdict |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, item in metrics["perplexity"].items():
        pruned = "not finite" if item["pruned"] is None else f"{item['pruned']:.3f}"
        lines.append(f"| {name} | {item['tokens']:,} | {item['dense']:.3f} | {pruned} | {verdict(metrics, name)} |")
    return "\n".join(["", *lines]) + "\n"
