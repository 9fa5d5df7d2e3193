"""A run's record: what was run, on what, and what came out."""

from dataclasses import dataclass
from typing import Any

from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.evaluation.perplexity import PerplexityResult
from lightning_prune.runs.verdict import verdict


@dataclass(frozen=True)
class RunRecord:
    """Everything beside the scores, the plan and the checkpoint. ``calibration`` is empty for an evaluation."""

    config: str
    calibration: dict[str, Any]
    environment: dict[str, Any]
    metrics: dict[str, Any]


def run_metrics(
    plan: PruningPlan,
    dense: dict[str, PerplexityResult],
    pruned: dict[str, PerplexityResult],
    evaluation: dict[str, dict[str, Any]],
    seconds: dict[str, float],
    peak_memory_bytes: int,
) -> dict[str, Any]:
    """The contents of ``metrics.json``.

    ``dense`` and ``pruned`` are perplexities, ``evaluation`` the protocol, by evaluation set; ``seconds`` by phase.
    """
    return {
        "perplexity": {
            name: {"dense": dense[name].perplexity, "pruned": pruned[name].perplexity, "tokens": dense[name].tokens}
            for name in dense
        },
        "evaluation": evaluation,
        "parameters": plan.parameters,
        "pruning_ratio": {"requested": plan.pruning_ratio, "achieved": plan.achieved_ratio},
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "peak_memory_bytes": peak_memory_bytes,
    }


def summary_table(label: str, metrics: dict[str, Any]) -> str:
    """The small table a run ends with."""
    parameters, ratio, seconds = metrics["parameters"], metrics["pruning_ratio"], metrics["seconds"]
    asked = "" if ratio["requested"] is None else f"requested {ratio['requested']:.4f}, "
    rows = [
        ("method", label),
        ("parameters", f"{parameters['dense']:,} → {parameters['pruned']:,}"),
        ("pruning ratio", f"{asked}achieved {ratio['achieved']:.4f}"),
    ]
    for name, item in metrics["perplexity"].items():
        # A perplexity says nothing without its protocol: how long the windows are, and of which split.
        protocol = metrics["evaluation"].get(name, {})
        split = "" if protocol.get("split") in (None, "all") else f" of the {protocol['split']} split"
        windows = f"{split} in windows of {protocol['seq_len']}" if "seq_len" in protocol else ""
        values = f"dense {item['dense']:.3f}, pruned {item['pruned']:.3f} ({item['tokens']:,} tokens{windows})"
        rows.append((f"perplexity {name}", f"{values}, {verdict(metrics, name)}"))
    rows += [
        ("seconds", ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())),
        ("peak memory", f"{metrics['peak_memory_bytes'] / 2**20:,.0f} MiB"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
