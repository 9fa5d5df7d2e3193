"""The tables that runs and recoveries end with, and what the model card says of a recovery."""

from typing import Any

from lightning_prune.runs.verdict import regained, share, verdict
from lightning_prune.support.escape import markdown, markdown_table, public_name

Rows = list[tuple[str, str]]


def summary_table(label: str, metrics: dict[str, Any]) -> str:
    """Of a run's ``metrics.json``."""
    parameters, ratio = metrics["parameters"], metrics["pruning_ratio"]
    requested = "" if ratio["requested"] is None else f"requested {ratio['requested']:.4f}, "
    rows = [
        ("method", label),
        ("parameters", f"{parameters['dense']:,} → {parameters['pruned']:,}"),
        ("pruning ratio", f"{requested}achieved {ratio['achieved']:.4f}"),
    ]
    for name, item in metrics["perplexity"].items():
        # A perplexity says nothing without its protocol: how long the windows are, and of which split.
        protocol = metrics["evaluation"].get(name, {})
        split = "" if protocol.get("split") in (None, "all") else f" of the {protocol['split']} split"
        windows = f"{split} in windows of {protocol['seq_len']}" if "seq_len" in protocol else ""
        values = f"dense {item['dense']:.3f}, pruned {item['pruned']:.3f} ({item['tokens']:,} tokens{windows})"
        rows.append((f"perplexity {name}", f"{values}, {verdict(metrics, name)}"))
    return _aligned(rows, metrics)


def recovery_table(label: str, metrics: dict[str, Any]) -> str:
    """Of a ``metrics.json`` with the ``recovery.json`` beside it under ``recovery``."""
    record = metrics["recovery"]
    return _aligned([("system", f"{label}, from {record['parent']}"), *_recovery_rows(record, metrics)], metrics)


def card_section(record: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The model card's section on the training, without the folders of this machine."""
    rows = [
        ("weights", "low-rank adapters, merged" if record["train"] == "lora" else "all"),
        ("text", public_name(record["text"]["dataset"])),
        ("teacher", "none" if record["teacher"] is None else public_name(record["teacher"])),
        *_recovery_rows(record, metrics),
    ]
    return "\n## Recovery\n\n" + markdown_table(("", ""), [(markdown(a), markdown(b)) for a, b in rows]) + "\n"


def _recovery_rows(record: dict[str, Any], metrics: dict[str, Any]) -> Rows:
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


def _aligned(rows: Rows, metrics: dict[str, Any]) -> str:
    """Two columns that end with time and memory."""
    rows.append(("seconds", ", ".join(f"{phase} {value:.1f}" for phase, value in metrics["seconds"].items())))
    rows.append(("peak memory", f"{metrics['peak_memory_bytes'] / 2**20:,.0f} MiB"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
