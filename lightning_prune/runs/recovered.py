"""What training gave back, in numbers and as the small table that a recovery ends with."""

import math
from typing import Any

LEAST = 0.01  # nats: a share of what is lost to rounding means nothing


def regained(dense: float | None, pruned: float | None, recovered: float | None) -> float | None:
    """Share of the lost log-perplexity that training gave back: 0 nothing, 1 all; None where less than ``LEAST`` nats
    were lost.

    (ln pruned − ln recovered) / (ln pruned − ln dense).
    """
    if not all(value is not None and math.isfinite(value) and value > 0 for value in (dense, pruned, recovered)):
        return None
    assert dense is not None and pruned is not None and recovered is not None  # noqa: PT018
    lost = math.log(pruned) - math.log(dense)
    return (math.log(pruned) - math.log(recovered)) / lost if lost >= LEAST else None


def share(value: float | None) -> str:
    """As a table says it."""
    return "–" if value is None else f"{value:.0%}"


def recovery_table(label: str, metrics: dict[str, Any]) -> str:
    """Rows of a ``metrics.json`` with the ``recovery.json`` beside it under ``recovery``."""
    facts, held_out = metrics["recovery"], metrics["recovery"]["held_out_loss"]
    rows = [
        ("system", f"{label}, from {facts['parent']}"),
        (
            "trained",
            f"{facts['trainable_parameters']:,} parameters, {facts['tokens_seen']:,} tokens, {facts['steps']:,} steps, "
            f"{facts['seconds']:.0f} s; ended by {facts['stopped_by']}",
        ),
        ("held-out loss", f"{held_out['before']:.4f} → {held_out['after']:.4f}"),
    ]
    for name, item in metrics["perplexity"].items():
        before = facts["perplexity"].get(name)
        words = [_number(value) for value in (item["dense"], before, item["pruned"])]
        gain = share(regained(item["dense"], before, item["pruned"]))
        rows.append(
            (
                f"perplexity {name}",
                f"dense {words[0]}, pruned {words[1]}, recovered {words[2]} ({item['tokens']:,} tokens): {gain} of the "
                "lost log-perplexity regained",
            )
        )
    if facts["zeroed_weights"] is not None:
        rows.append(("zeroed weights", f"{facts['zeroed_weights']:,}, all still zero"))
    rows.append(("seconds", ", ".join(f"{phase} {value:.1f}" for phase, value in metrics["seconds"].items())))
    rows.append(("peak memory", f"{metrics['peak_memory_bytes'] / 2**20:,.0f} MiB"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"
