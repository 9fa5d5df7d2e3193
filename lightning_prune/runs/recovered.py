"""What training gave back, in numbers, as the small table that a recovery ends with, and in the model card."""

import math
from typing import Any

from lightning_prune.support.escape import markdown, markdown_table, public_name

LEAST = 0.01  # nats: a share of what is lost to rounding means nothing


def regained(dense: float | None, pruned: float | None, recovered: float | None) -> float | None:
    """Share of the lost log-perplexity that training gave back: 0 nothing, 1 all; None where less than ``LEAST`` nats
    were lost.

    (ln pruned − ln recovered) / (ln pruned − ln dense).
    """
    if any(value is None or not 0 < value < math.inf for value in (dense, pruned, recovered)):
        return None
    lost_and_left = math.log(pruned / dense), math.log(pruned / recovered)  # type: ignore[operator]
    return lost_and_left[1] / lost_and_left[0] if lost_and_left[0] >= LEAST else None


def share(value: float | None) -> str:
    """As a table says it."""
    return "–" if value is None else f"{value:.0%}"


def recovery_table(label: str, metrics: dict[str, Any]) -> str:
    """Rows of a ``metrics.json`` with the ``recovery.json`` beside it under ``recovery``."""
    rows = [("system", f"{label}, from {metrics['recovery']['parent']}"), *_rows(metrics["recovery"], metrics)]
    rows.append(("seconds", ", ".join(f"{phase} {value:.1f}" for phase, value in metrics["seconds"].items())))
    rows.append(("peak memory", f"{metrics['peak_memory_bytes'] / 2**20:,.0f} MiB"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def card_section(record: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The model card's section on the training, without the folders of this machine."""
    rows = [
        ("weights", "low-rank adapters, merged" if record["train"] == "lora" else "all"),
        ("text", public_name(record["text"]["dataset"])),
        ("teacher", "none" if record["teacher"] is None else public_name(record["teacher"])),
        *_rows(record, metrics),
    ]
    return "\n## Recovery\n\n" + markdown_table(("", ""), [(markdown(a), markdown(b)) for a, b in rows]) + "\n"


def _rows(record: dict[str, Any], metrics: dict[str, Any]) -> list[tuple[str, str]]:
    loss = record["held_out_loss"]
    rows = [
        (
            "trained",
            f"{record['trainable_parameters']:,} parameters, {record['tokens_seen']:,} tokens, {record['steps']:,} "
            f"steps, {record['seconds']:.0f} s; ended by {record['stopped_by']}",
        ),
        ("held-out loss", f"{loss['before']:.4f} → {loss['after']:.4f}"),
    ]
    for name, item in metrics["perplexity"].items():
        values = item["dense"], record["perplexity"].get(name), item["pruned"]
        dense, pruned, recovered = ("not finite" if value is None else f"{value:.3f}" for value in values)
        rows.append(
            (
                f"perplexity {public_name(name)}",
                f"dense {dense}, pruned {pruned}, recovered {recovered} ({item['tokens']:,} tokens): "
                f"{share(regained(*values))} of the lost log-perplexity regained",
            )
        )
    if record["zeroed_weights"] is not None:
        rows.append(("zeroed weights", f"{record['zeroed_weights']:,}, all still zero"))
    return rows
