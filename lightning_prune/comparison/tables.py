"""The results as pandas tables, and any table as terminal text and Markdown."""

import re
import statistics
from collections.abc import Mapping, Sequence

import pandas as pd  # type: ignore[import-untyped]
from tabulate import tabulate  # type: ignore[import-untyped]

from lightning_prune.comparison import accuracy, costs
from lightning_prune.comparison.audit import Group
from lightning_prune.comparison.records import Run
from lightning_prune.comparison.repeats import Repeats, Spread, in_order, repeats
from lightning_prune.runs.verdict import share
from lightning_prune.support.escape import plain, public_name

SUFFIX = re.compile(r"\.(txt|jsonl?|json\.gz|gz|parquet|npy|safetensors)$", re.IGNORECASE)
NUMBER = re.compile(r"[+-]?\d|–|not finite|$")


def evaluation_sets(runs: Sequence[Run]) -> dict[str, str]:
    """A short name by evaluation set, in order of appearance: without the suffix, and without a last folder that all
    share, so that ``wikitext2/test.txt`` and ``ptb/test.txt`` become ``wikitext2`` and ``ptb``; full names where two
    would become the same. Long windows have the short name of their set, and their length."""
    own = {name: run.metrics.evaluation[name].long_windows_of or name for run in runs for name in run.sets}
    names = list(dict.fromkeys(own.values()))
    short = [SUFFIX.sub("", name) for name in names]
    if len(short) > 1 and all("/" in name for name in short) and len({name.rpartition("/")[2] for name in short}) == 1:
        short = [name.rpartition("/")[0] for name in short]
    shorter = dict(zip(names, short if len(set(short)) == len(short) else names, strict=True))
    return {name: shorter[of] + name.removeprefix(of) for name, of in own.items()}


def table(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """Cells as text on one line; columns in the order of the first row."""
    return pd.DataFrame([{plain(key): plain(cell) for key, cell in row.items()} for row in rows], dtype=object)


def results(lines: Sequence[Repeats], group: Group, dense: bool = True) -> pd.DataFrame:
    """Lines of one group by ratio and then in the order given, as text; the dense model first."""
    sets = evaluation_sets(group.all)
    rows: list[dict[str, str]] = []
    for line in in_order(lines):
        row = {"system": line.name, "ratio": line.size}
        for name, short in sets.items():
            row[f"perplexity {short}"] = spread(line.perplexity(name)) if name in line.sets else "–"
        for name, short in sets.items():
            if any(name in run.metrics.distance for run in group.all):
                row[f"KL {short}"] = line.shown_distance(name, "kl_divergence")
        row |= {"n": str(len(line.runs))} if repeated(group) else {}
        words = [line.shown_verdict(name) for name in sets if name in line.sets]
        # Where it differs between evaluation sets, one after the other in their order.
        row["verdict"] = " / ".join(words if len(set(words)) > 1 else words[:1]) or "not evaluated"
        if any(run.details.experts for run in group.all):
            row["tokens per expert"] = _tokens_per_expert(line.first)
        row |= accuracy.cells(line.runs, group.all)
        row["achieved"] = f"{line.achieved:.4f}"
        row["parameters"] = f"{line.average(lambda run: run.metrics.parameters.pruned):,.0f}"
        if any(run.metrics.parameters.pruned_active for run in group.all):
            row["active"] = shown(line.average(lambda run: run.metrics.parameters.pruned_active), ",.0f")
        # The first seed's runs measured what the other ratios reuse, and so it is with every seed.
        row["calibrate s"] = shown(line.average(costs.calibration)) + (" *" if costs.reused(line.first) else "")
        row["prune s"] = shown(line.average(costs.pruning))
        row["evaluate s"] = shown(line.average(lambda run: run.metrics.seconds.get(costs.EVALUATE)))
        row["memory MiB"] = f"{max(run.metrics.peak_memory_bytes for run in line.runs) / 2**20:,.0f}"
        rows.append(row)
    if dense:
        rows.insert(0, dict.fromkeys(rows[0], "") | _dense_row(group, sets))
    return table(rows)


def _tokens_per_expert(run: Run) -> str:
    if (facts := run.details.experts) is None:
        return "–"
    counts = [count for layer in facts.tokens.values() for count in layer]
    return f"{statistics.median(counts):,.0f}, fewest {facts.fewest_tokens:,}"


def distances(lines: Sequence[Repeats], group: Group) -> pd.DataFrame | None:
    """Table of the distances from the dense model beside KL, and of continuations; None where none is known."""
    if not any(run.metrics.distance for run in group.all):
        return None
    rows = []
    for line in in_order(lines):
        row = {"system": line.name, "ratio": line.size}
        for name, short in evaluation_sets(group.all).items():
            row[f"top-1 agreement {short}"] = line.shown_distance(name, "top1_agreement")
            row[f"acceptance {short}"] = line.shown_distance(name, "expected_acceptance")
        written = line.first.metrics.continuations
        if any(run.metrics.continuations for run in group.all):
            row["equal tokens"] = "–" if written is None else f"{written.common_beginning:.1f} of {written.new_tokens}"
            for key, name in (("repeated_4grams", "repeated 4-grams"), ("ended", "ended")):
                sides = [] if written is None else [getattr(one, key) for one in (written.dense, written.pruned)]
                row[name] = " → ".join(map(share, sides)) or "–"
        rows.append(row)
    return table(rows)


def repeated(group: Group) -> bool:
    """Whether a system was run more than once at one ratio."""
    return any(len(line.runs) > 1 for line in repeats(group.all))


def _dense_row(group: Group, sets: Mapping[str, str]) -> dict[str, str]:
    first = group.all[0]
    row = {"system": "dense", "ratio": "0", "achieved": "0.0000"}
    row["parameters"] = f"{first.metrics.parameters.dense:,}"
    if any(run.metrics.parameters.dense_active for run in group.all):
        row["active"] = f"{max(run.metrics.parameters.dense_active or 0 for run in group.all):,}"
    for name, short in sets.items():
        having = next((run for run in group.all if name in run.sets), None)
        row[f"perplexity {short}"] = "–" if having is None else number(having.dense(name))
    for run in reversed(group.all):  # the first one counts that has them
        if costs.EVALUATE_DENSE in run.metrics.seconds:
            row["evaluate s"] = shown(run.metrics.seconds[costs.EVALUATE_DENSE])
    return row | accuracy.cells([first], group.all, dense=True)


def setting(group: Group) -> str:
    """Base model, calibration and evaluation of a table, with full names and fingerprints."""
    calibration = group.calibration
    parts = [f"Base model: {public_name(group.all[0].metrics.method.base_model)}"]
    if calibration is None:
        parts.append("No calibration")
    else:
        ordered = sorted(group.all, key=lambda run: run.seed or 0)
        prints = dict.fromkeys(run.calibration.fingerprint[:12] for run in ordered if run.calibration is not None)
        drawn = f"{sample_size(group)}, {calibration.sampling}, fingerprint {', '.join(prints)}"
        parts.append(f"Calibration: {public_name(calibration.dataset)}, {drawn}")
    for name, short in evaluation_sets(group.all).items():
        metrics = next(run for run in group.all if name in run.sets).metrics
        called = "" if short == name else f"{short} is "
        tokens, facts = metrics.perplexity[name].tokens, metrics.evaluation[name]
        unigram = (
            ""
            if facts.unigram_perplexity is None
            else f" (token frequencies alone: {number(facts.unigram_perplexity)})"
        )
        parts.append(f"Perplexity: {called}{name}, {tokens:,} tokens in windows of {facts.seq_len}{unigram}")
    return ". ".join(parts) + "."


def sample_size(group: Group) -> str:
    """How many tokens a group calibrated on, and the seeds that drew them: ``128 × 128 tokens, seed 0``; empty where
    nothing was calibrated."""
    if (calibration := group.calibration) is None:
        return ""
    seeds = sorted({run.seed for run in group.all if run.seed is not None})
    drawn = f", seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else ""
    return f"{calibration.num_samples} × {calibration.seq_len} tokens{drawn}"


def spread(values: Spread) -> str:
    """The mean, with the sample standard deviation where there is one."""
    return number(values.mean) + ("" if values.deviation is None else f" ± {number(values.deviation)}")


def number(value: float | None) -> str:
    """A perplexity: three decimals while they mean something."""
    if value is None:
        return "not finite"
    return f"{value:.3f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def shown(value: float | None, form: str = ".1f") -> str:
    """A number as a table cell: in seconds, or as ``form`` says; a dash for None."""
    return "–" if value is None else format(value, form)


def numeric_column(cells: Sequence[str]) -> bool:
    """Whether a column is one of numbers, which are aligned to the right."""
    return all(NUMBER.match(cell) for cell in cells)


def text_table(frame: pd.DataFrame, form: str = "plain") -> str:
    """Aligned columns for a terminal, or another form of ``tabulate``'s."""
    align = ["right" if numeric_column(frame[column]) else "left" for column in frame.columns]
    rows = frame.to_numpy().tolist()
    return str(tabulate(rows, headers=list(frame.columns), tablefmt=form, disable_numparse=True, colalign=align))
