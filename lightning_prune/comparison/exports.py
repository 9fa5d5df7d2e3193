"""``results.csv``, ``zero_shot.csv`` and ``results.tex``."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from lightning_prune.comparison import accuracy, costs
from lightning_prune.comparison.audit import Audit, Group
from lightning_prune.comparison.records import Run
from lightning_prune.comparison.repeats import Repeats, Spread, by_size, percent, repeats
from lightning_prune.comparison.tables import evaluation_sets, number, results, setting, spread
from lightning_prune.runs.records import DistanceFacts, Failure
from lightning_prune.runs.verdict import UNUSABLE
from lightning_prune.support.escape import latex as escape
from lightning_prune.support.escape import plain

CAPTION = (
    "Perplexity after pruning, lower is better (± sample standard deviation over calibration seeds, in parentheses "
    "the achieved ratio where it is not the one requested)."
)

KL_CAPTION = "KL(dense ‖ pruned) in nats per token after pruning, lower is better (± as for perplexity)."


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """A line per row: text on one line, numbers with every digit, nothing for None."""
    cells = [
        {key: one if isinstance(one, int | float | None) else plain(one) for key, one in row.items()} for row in rows
    ]
    return str(pd.DataFrame(cells, dtype=object).to_csv(index=False, lineterminator="\n"))


def results_csv(audit: Audit, failures: Sequence[Failure]) -> str:
    """``results.csv``: one line per run and evaluation set; mean and deviation are those of the run's system and ratio
    over all ``n`` seeds."""
    rows: list[dict[str, Any]] = []
    for index, group in enumerate(audit.groups, start=1):
        lines = {run: line for line in repeats(group.all) for run in line.runs}
        for run in sorted(group.all, key=lambda run: run.requested):
            row = {"table": index, "status": "finished"}
            rows += [row | _facts(run, lines[run], name, run in group.runs) for name in run.sets or ("",)]
    for one in failures:
        size = "target" if isinstance(one.requested, str) else "requested_ratio"
        rows.append({"status": "failed", "system": one.label, size: one.requested, "message": one.message})
    return csv_text(rows)


def _facts(run: Run, line: Repeats, name: str, reached: bool) -> dict[str, Any]:
    method, spent, recovery = run.metrics.method, run.metrics.seconds, run.recovery
    manifest = run.metrics.evaluation.get(name)
    over = line.perplexity(name) if name in line.sets else Spread()
    distance, kl = run.metrics.distance.get(name), line.distance(name, "kl_divergence")
    return {
        "system": run.label,
        "method": method.name,
        "requested_ratio": run.metrics.pruning_ratio.requested,
        "target": run.target,
        "achieved_ratio": run.achieved,
        "ratio_reached": int(reached),
        "evaluation_set": name,
        "dense_perplexity": None if not name else run.dense(name),
        "perplexity": None if not name else run.shown_perplexity(name),
        "unigram_perplexity": manifest and manifest.unigram_perplexity,
        "calibration_seed": run.seed,
        "n": len(line.runs),
        "perplexity_mean": over.mean,
        "perplexity_sd": over.deviation,
        "verdict": None if not name else run.verdict(name, run.perplexity(name), run.divergence(name)),
        **{key: None if distance is None else getattr(distance, key) for key in DistanceFacts.model_fields},
        "kl_mean": kl.mean,
        "kl_sd": kl.deviation,
        "predicted_tokens": None if not name else run.metrics.perplexity[name].tokens,
        "evaluation_seq_len": manifest and manifest.seq_len,
        "parameters_dense": run.metrics.parameters.dense,
        "parameters_pruned": run.metrics.parameters.pruned,
        "parameters_active": run.metrics.parameters.pruned_active,
        "base_model": method.base_model,
        "calibration_fingerprint": run.calibration and run.calibration.fingerprint,
        "precision": run.environment.precision,
        "seconds_calibrate": costs.calibration(run),
        "scores_measured_by": (run.details.measured_by or "unknown") if method.scores_reused else None,
        "seconds_prune": costs.pruning(run),
        "seconds_evaluate": spent.get(costs.EVALUATE),
        "seconds_evaluate_dense": spent.get(costs.EVALUATE_DENSE),
        "seconds_load": spent.get("load"),
        "seconds_tokenise": spent.get("tokenise"),
        "seconds_total": spent.get("total"),
        "recovered_from": recovery and recovery.parent,
        "perplexity_before_recovery": recovery and recovery.perplexity.get(name),
        "tokens_seen": recovery and recovery.tokens_seen,
        "seconds_train": recovery and recovery.seconds,
        "peak_memory_bytes": run.metrics.peak_memory_bytes,
        "folder": run.folder,
        "message": None,
    }


def accuracy_csv(audit: Audit) -> str:
    """``zero_shot.csv``: a line per model, task and metric; the dense model once per table."""
    rows: list[dict[str, Any]] = []
    for index, group in enumerate(audit.groups, start=1):
        measured = [(run, run.accuracy) for run in group.all if run.accuracy is not None]
        models: list[tuple[Any, ...]] = [
            ("dense", 0, None, one.dense, one.harness, run.metrics.method.base_model) for run, one in measured[:1]
        ]
        models += [
            (run.label, run.metrics.pruning_ratio.requested, run.target, one.pruned, one.harness, run.folder)
            for run, one in measured
        ]
        for label, ratio, target, tasks, harness, where in models:
            row = {"table": index, "system": label, "requested_ratio": ratio, "target": target}
            rows += [
                row | {"task": task, "metric": metric} | asdict(score) | {"harness": harness, "folder": where}
                for task, metrics in tasks.items()
                for metric, score in metrics.items()
            ]
    return csv_text(rows)


def latex(audit: Audit) -> str:
    """``results.tex``: booktabs tables of perplexity, systems down and ratios across, one per group of comparable runs,
    and one more each where the distance from the dense model, or accuracy, was measured."""
    parts = ["% Needs \\usepackage{booktabs}."]
    for index, group in enumerate(audit.groups, start=1):
        lines = repeats(group.all)
        parts.append(_booktabs(_by_ratio(lines, group), f"{CAPTION} {setting(group)}", f"tab:pruning-{index}"))
        if any(run.metrics.distance for run in group.all):
            caption = f"{KL_CAPTION} {setting(group)}"
            parts.append(_booktabs(_by_ratio(lines, group, "kl_divergence"), caption, f"tab:divergence-{index}"))
        if tasks := list(accuracy.cells(group.all[:1], group.all)):
            frame = results(lines, group).set_index("system").rename_axis(None)[["ratio", *tasks]]
            caption = f"Accuracy after pruning. {accuracy.LEGEND} {setting(group)}"
            parts.append(_booktabs(frame, caption, f"tab:accuracy-{index}"))
    return "\n".join(parts)


def _by_ratio(lines: Sequence[Repeats], group: Group, distance: str | None = None) -> pd.DataFrame:
    """Perplexity, or a ``distance``, which the dense model has none of."""
    sets, sizes = evaluation_sets(group.all), by_size(lines)
    first, cells = group.all[0], {(line.name, line.size): line for line in lines}
    rows = {}
    if distance is None:
        rows["Dense"] = [number(first.dense(name)) if name in first.sets else "–" for name in sets for _ in sizes]
    for label in dict.fromkeys(line.name for line in lines):
        rows[plain(label)] = [_cell(cells.get((label, size)), name, group, distance) for name in sets for size in sizes]
    columns = pd.MultiIndex.from_product([list(map(plain, sets)), list(map(percent, sizes))])
    return pd.DataFrame(list(rows.values()), index=list(rows), columns=columns)


def _cell(line: Repeats | None, name: str, group: Group, distance: str | None) -> str:
    if line is None or name not in line.sets:
        return "–"
    if distance is not None:
        return line.shown_distance(name, distance)
    value = spread(line.perplexity(name))
    if line.verdict(name) == UNUSABLE:
        value = "unusable" if line.perplexity(name).mean is None else f"unusable, {value}"
    return value + (f" ({line.first.achieved * 100:.1f} %)" if line.first in group.other_ratio else "")


def _booktabs(frame: pd.DataFrame, caption: str, label: str) -> str:
    def tex(cell: str) -> str:
        return escape(cell).replace("±", r"$\pm$").replace("–", "--").replace("‖", r"$\|$").replace("×", r"$\times$")

    safe = frame.rename(index=tex, columns=tex).map(tex)
    options = {"position_float": "centering", "multicol_align": "c", "column_format": "l" + "r" * len(frame.columns)}
    return str(safe.style.to_latex(hrules=True, caption=tex(caption), label=label, **options))
