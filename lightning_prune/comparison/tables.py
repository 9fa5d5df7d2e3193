"""The result as rows, and the rows as terminal text, Markdown and CSV."""

import csv
import io
from collections.abc import Sequence

from lightning_prune.comparison import accuracy, costs
from lightning_prune.comparison.audit import Audit, Group
from lightning_prune.comparison.names import short_names
from lightning_prune.comparison.recovery import before
from lightning_prune.comparison.repeats import Repeats, Spread, repeats, seed, seeds
from lightning_prune.comparison.run import Run
from lightning_prune.runs.failure import Failure
from lightning_prune.support.escape import markdown, plain, public_name
from lightning_prune.support.escape import markdown_table as pipe_table

Row = tuple[str, ...]
SEVERAL = " / "  # between verdicts on evaluation sets

CSV_COLUMNS = (
    "table",
    "status",
    "system",
    "method",
    "requested_ratio",
    "achieved_ratio",
    "ratio_reached",
    "evaluation_set",
    "dense_perplexity",
    "perplexity",
    "unigram_perplexity",
    "calibration_seed",
    "n",
    "perplexity_mean",
    "perplexity_sd",
    "verdict",
    "predicted_tokens",
    "evaluation_seq_len",
    "parameters_dense",
    "parameters_pruned",
    "base_model",
    "calibration_fingerprint",
    "precision",
    "seconds_calibrate",
    "scores_measured_by",
    "seconds_prune",
    "seconds_evaluate",
    "seconds_evaluate_dense",
    "seconds_load",
    "seconds_tokenise",
    "seconds_total",
    "recovered_from",
    "perplexity_before_recovery",
    "tokens_seen",
    "seconds_train",
    "peak_memory_bytes",
    "folder",
    "message",
)


def header(sets: Sequence[str], repeated: bool = False, more: Sequence[str] = ()) -> tuple[str, ...]:
    """Column names; ``sets`` are the evaluation sets. What a reader came for stands first, where seeds were
    ``repeated`` with their number; ``more`` are columns of zero-shot tasks."""
    short = short_names(sets)
    columns = ["system", "ratio", *(f"perplexity {short[name]}" for name in sets), *(["n"] if repeated else [])]
    columns += ["verdict", *more]
    return (*columns, "achieved", "parameters", "calibrate s", "prune s", "evaluate s", "memory MiB")


def evaluation_sets(runs: Sequence[Run]) -> list[str]:
    """Names of all evaluation sets, in order of appearance."""
    return list(dict.fromkeys(name for run in runs for name in run.sets))


def display_names(runs: Sequence[Run]) -> dict[int, str]:
    """A name for every run by ``id``: the label, with the run folder where a label comes twice at one ratio."""
    keys = [(run.label, run.requested) for run in runs]
    return {
        id(run): run.label if keys.count((run.label, run.requested)) == 1 else f"{run.label}/{run.folder.name}"
        for run in runs
    }


def rows(runs: Sequence[Run], sets: Sequence[str], group: Sequence[Run], repeated: bool = False) -> list[Row]:
    """Runs of one ``group``, seeds as one line, by ratio and then in the order given; the dense model leads."""
    lines = repeats(runs)
    names = display_names([line.first for line in lines])
    found: list[Row] = []
    if runs:
        dense = [number(runs[0].perplexity(name, "dense")) if name in runs[0].sets else "–" for name in sets]
        dense += [""] if repeated else []
        measured = [value for run in runs if (value := costs.spent(run, costs.EVALUATE_DENSE)) is not None]
        seconds = costs.text(measured[0]) if measured else ""
        dense += ["", *accuracy.cells(runs[:1], group, dense=True)]
        found.append(("dense", "0", *dense, "0.0000", f"{runs[0].dense_parameters:,}", "", "", seconds, ""))
    for line in sorted(lines, key=lambda line: line.first.requested):
        perplexities = [spread(line.perplexity(name)) if name in line.sets else "–" for name in sets]
        # The first seed's runs measured what the other ratios reuse, and so it is with every seed.
        mark = costs.mark(line.first)
        found.append(
            (
                names[id(line.first)],
                f"{line.first.requested:g}",
                *perplexities,
                *([str(len(line.runs))] if repeated else []),
                word(line, sets),
                *accuracy.cells(line.runs, group),
                f"{line.average(lambda run: run.achieved):.4f}",
                f"{line.average(lambda run: run.pruned_parameters):,.0f}",
                costs.text(line.average(costs.calibration), mark),
                costs.text(line.average(costs.pruning)),
                costs.text(line.average(lambda run: costs.spent(run, costs.EVALUATE))),
                f"{max(run.peak_memory_bytes for run in line.runs) / 2**20:,.0f}",
            )
        )
    return found


def word(line: Repeats, sets: Sequence[str]) -> str:
    """The verdict; where it differs between ``sets``, one after the other in their order."""
    words = [line.verdict(name) for name in sets if name in line.sets]
    return SEVERAL.join(words if len(set(words)) > 1 else words[:1]) or "not evaluated"


def spread(found: Spread) -> str:
    """The mean, with the sample standard deviation where there is one."""
    if found.deviation is None:
        return number(found.mean)
    return f"{number(found.mean)} ± {number(found.deviation)}"


def number(value: float | None) -> str:
    """A perplexity: three decimals while they mean something."""
    if value is None:
        return "not finite"
    return f"{value:.3f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def text_table(columns: Sequence[str], lines: Sequence[Row]) -> str:
    """Aligned columns for a terminal; numbers to the right."""
    cells = [tuple(plain(cell) for cell in row) for row in (columns, *lines)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    left = {0, list(columns).index("verdict")} if "verdict" in columns else {0}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def markdown_table(columns: Sequence[str], lines: Sequence[Row]) -> str:
    """A pipe table of plain cells."""
    return pipe_table(tuple(map(markdown, columns)), [tuple(map(markdown, row)) for row in lines])


def title(index: int, group: Group) -> str:
    """What the runs of a table share, in words; ``setting`` has the facts."""
    facts = group.calibration
    how = "" if facts is None else f", calibrated on {facts['num_samples']} × {facts['seq_len']} tokens"
    return f"Table {index}: {public_name(group.all[0].base_model)}{how}"


def setting(group: Group) -> str:
    """Base model, calibration and evaluation of a table, with full names and fingerprints."""
    first, facts = group.all[0], group.calibration
    parts = [f"Base model: {first.base_model}"]
    if facts is None:
        parts.append("No calibration")
    else:
        text = f"Calibration: {public_name(str(facts['dataset']))}, {facts['num_samples']} × {facts['seq_len']} tokens"
        known = {seed(run): str(run.calibration["fingerprint"])[:12] for run in group.all if run.calibration}
        several = "s" if len(known) > 1 else ""
        drawn = f", seed{several} {', '.join(map(str, seeds(group.all)))}" if seeds(group.all) else ""
        prints = ", ".join(known[one] for one in sorted(known, key=lambda one: one or 0))
        parts.append(f"{text}, {facts['sampling']}{drawn}, fingerprint{several} {prints}")
    for name, short in short_names(evaluation_sets(group.all)).items():
        run = next(run for run in group.all if name in run.sets)
        window = run.evaluation.get(name, {}).get("seq_len")
        windows = f" in windows of {window}" if window else ""
        called = "" if short == name else f"{short} is "
        parts.append(f"Perplexity: {called}{name}, {run.predicted_tokens(name):,} tokens{windows}")
    return ". ".join(parts) + "."


def csv_text(audit: Audit, failures: Sequence[Failure]) -> str:
    """One line per run and evaluation set, full precision; mean and deviation are those of the run's system and ratio
    over all ``n`` seeds."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for index, group in enumerate(audit.groups, start=1):
        lines = {id(run): line for line in repeats(group.all) for run in line.runs}
        for run in sorted(group.all, key=lambda run: run.requested):
            for name in run.sets or [""]:
                writer.writerow(_cells(_csv_row(index, group, run, lines[id(run)], name)))
    for failure in failures:
        values = {"status": "failed", "system": failure.label, "requested_ratio": failure.requested}
        writer.writerow(_cells(values | {"message": failure.message}))
    return buffer.getvalue()


def _csv_row(index: int, group: Group, run: Run, line: Repeats, name: str) -> dict[str, object]:
    row: dict[str, object] = {
        "table": index,
        "status": "finished",
        "system": run.label,
        "method": run.method,
        "requested_ratio": run.requested,
        "achieved_ratio": run.achieved,
        "ratio_reached": int(any(run is other for other in group.runs)),
        "parameters_dense": run.dense_parameters,
        "parameters_pruned": run.pruned_parameters,
        "base_model": run.base_model,
        "calibration_fingerprint": (run.calibration or {}).get("fingerprint", ""),
        "calibration_seed": seed(run),
        "n": len(line.runs),
        "precision": run.environment.get("precision", ""),
        "seconds_calibrate": costs.calibration(run),
        "scores_measured_by": (run.measured_by or "unknown") if run.reused_scores else "",
        "seconds_prune": costs.pruning(run),
        "seconds_evaluate": costs.spent(run, costs.EVALUATE),
        "seconds_evaluate_dense": costs.spent(run, costs.EVALUATE_DENSE),
        "seconds_load": costs.spent(run, ("load",)),
        "seconds_tokenise": costs.spent(run, ("tokenise",)),
        "seconds_total": run.seconds.get("total"),
        "recovered_from": "" if run.recovery is None else run.recovery["parent"],
        "tokens_seen": None if run.recovery is None else run.recovery["tokens_seen"],
        "seconds_train": None if run.recovery is None else run.recovery["seconds"],
        "peak_memory_bytes": run.peak_memory_bytes,
        "folder": run.folder,
    }
    if name:
        manifest = run.evaluation.get(name, {})
        row |= {
            "evaluation_set": name,
            "dense_perplexity": run.perplexity(name, "dense"),
            "perplexity": "not finite" if run.perplexity(name) is None else run.perplexity(name),
            "perplexity_mean": line.perplexity(name).mean if name in line.sets else None,
            "perplexity_sd": line.perplexity(name).deviation if name in line.sets else None,
            "unigram_perplexity": run.unigram_perplexity(name),
            "verdict": run.verdict(name),
            "predicted_tokens": run.predicted_tokens(name),
            "evaluation_seq_len": manifest.get("seq_len", ""),
            "perplexity_before_recovery": before(run, name),
        }
    return row


def _cells(row: dict[str, object]) -> dict[str, object]:
    """Strings on one line, numbers with every digit."""
    return {
        key: value if value is None or isinstance(value, int | float) else plain(value) for key, value in row.items()
    }
