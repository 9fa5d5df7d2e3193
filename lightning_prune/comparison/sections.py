"""The report's text and tables, before any format: the terminal, Markdown and HTML show the same ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd  # type: ignore[import-untyped]

from lightning_prune.comparison import accuracy, costs
from lightning_prune.comparison.audit import Audit, Group, not_held_out
from lightning_prune.comparison.records import Run
from lightning_prune.comparison.repeats import Repeats, by_size, percent, repeats
from lightning_prune.comparison.selection import FULL, precision_rows
from lightning_prune.comparison.tables import (
    distances,
    evaluation_sets,
    number,
    repeated,
    results,
    sample_size,
    setting,
    shown,
    spread,
    table,
    text_table,
)
from lightning_prune.runs import verdict
from lightning_prune.runs.records import Failure
from lightning_prune.runs.verdict import regained, share
from lightning_prune.support.escape import markdown as escaped
from lightning_prune.support.escape import plain, public_name

REPEATED = (
    "± is the sample standard deviation over n calibration seeds, around their mean; seconds, parameters and the ratio "
    "achieved are means, peak memory is the largest. What draws no calibration samples runs once."
)
DISTANCE = (
    "Distance from the dense model, over the same tokens: KL(dense ‖ pruned) in nats per token; top-1 agreement, the "
    "share of tokens for which both have the same most probable one; acceptance, the share of the pruned model's "
    "tokens that the dense one would accept if the pruned one drafted for it, Σ min(p, q). Continuations are greedy: "
    "how many tokens are equal before both models part; runs of four tokens that repeat, and texts that came to their "
    "end, dense → pruned, of the lowest seed. NAME@N is the same text in windows of N tokens."
)
# Columns of results that are in a table of their own, so that a line of quality fits a terminal.
COSTS = ("parameters", "active", "calibrate s", "prune s", "evaluate s", "memory MiB")
TIED = (
    "Systems that share a cell of best tie: their means are apart by no more than √(a² + b²), a and b their "
    "standard deviations over calibration seeds, which are rough themselves with few seeds."
)
ONCE = "Nothing was repeated, so a small lead may be chance: --seeds 0 1 2 measures the spread."
TRAINED = "Systems that were trained after pruning are not ranked here; see the section on recovery."
RECOVERY = (
    "These systems trained the pruned model of the run they came from; the others did not train. Regained is the share "
    "of the lost log-perplexity: (ln pruned − ln recovered) / (ln pruned − ln dense)."
)


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, bullet points, and tables of text with a caption each, which may be empty."""

    heading: str
    text: list[str] = field(default_factory=list)
    tables: list[tuple[str, pd.DataFrame]] = field(default_factory=list)
    bullets: list[str] = field(default_factory=list)


def sections(audit: Audit, failures: Sequence[Failure]) -> list[Section]:
    """The best per ratio, failed runs, tables, then what was checked and what differs."""
    runs = audit.runs
    parts = [_best(audit.groups[0])] if runs else []
    if failures:
        rows = [{"system": one.label, "ratio": f"{one.requested}", "error": one.message} for one in failures]
        parts.append(Section("Failed runs", tables=[("", table(rows))]))
    parts += [_results(index, group) for index, group in enumerate(audit.groups, start=1)]
    if not audit.differences:
        text = "Base model, tokenizer, precision, evaluation, calibration and ratio (within 0.01) agree in all runs."
        parts.append(Section("Audit: no differences", [text], bullets=audit.notes))
    else:
        text = "Runs that differ in these facts are in different tables, or apart within one:"
        rows = [
            {"fact": f"{one.what}{f' ({one.remark})' if one.remark else ''}", "value": value, "runs": having}
            for one in audit.differences
            for value, having in one.named().items()
        ]
        parts.append(Section("Audit: differences", [text], [("", table(rows))], audit.notes))
    if recovered := _recovery(runs):
        parts.append(Section("Recovery", [RECOVERY], [("", table(recovered))]))
    if half := precision_rows(runs):
        text = f"Runs and the run in {FULL} with the same method, options, ratio, base model and calibration tokens."
        rows = [
            {
                key.replace("_", " "): f"{value:.4g}" if isinstance(value, float) else "–" if value is None else value
                for key, value in row.items()
            }
            for row in half
        ]
        parts.append(Section("Precision", [text], [("", table(rows).drop(columns=["folder", "folder 32 true"]))]))
    if runs:
        legend = [verdict.LEGEND, costs.LEGEND]
        legend += [DISTANCE] if any(run.metrics.distance for run in runs) else []
        legend += [costs.LEGEND_REUSED] if any(map(costs.reused, runs)) else []
        legend += [REPEATED] if any(repeated(group) for group in audit.groups) else []
        legend += [accuracy.LEGEND] if accuracy.shown_tasks(runs) else []
        legend += ["Several verdicts on a line are in the order of the perplexity columns."]
        legend += dict.fromkeys(remark for run in runs for remark in _too_long(run))
        parts.append(Section("How to read the tables", bullets=legend))
    return parts


def _too_long(run: Run) -> list[str]:
    sets = {name: one.long_windows_of for name, one in run.metrics.evaluation.items()}
    known = {name: short for name, short in sets.items() if short in sets}
    remarks = {name: verdict.too_long(run.dense(short), run.dense(name)) for name, short in known.items()}
    return [f"{name}: {remark}." for name, remark in remarks.items() if remark]


def leaders(lines: Sequence[Repeats], name: str) -> list[Repeats]:
    """The best usable lines of one ratio on one evaluation set, best first: the lowest mean and what ties with it.

    Two tie whose means are equal, or apart by no more than √(a² + b²), a and b their deviations; an unknown deviation
    counts as 0.
    """
    usable = [
        (spread.mean, spread.deviation or 0.0, line)
        for line in lines
        if name in line.sets and line.verdict(name) != verdict.UNUSABLE
        if (spread := line.perplexity(name)).mean is not None  # as every usable one's is
    ]
    usable.sort(key=lambda one: one[0])
    return [line for mean, deviation, line in usable if mean - usable[0][0] <= math.hypot(usable[0][1], deviation)]


def _best(group: Group) -> Section:
    """The answer: who leads at each ratio, by how much, and whether that is more than noise."""
    untrained = [run for run in group.runs if run.recovery is None]
    lines, sets, rows, closer, tied = repeats(untrained), evaluation_sets(untrained), [], [], False
    for size, alike in by_size(lines).items():
        for name, short in sets.items():
            here = [line for line in alike if name in line.sets]
            best = leaders(here, name)
            after = leaders([line for line in here if line not in best], name)
            dense = here[0].first.dense(name) if here else None
            row = {"ratio": size} | ({"set": short} if len(sets) > 1 else {})
            row["best"] = ", ".join(line.name for line in best) or "none is usable"
            row["perplexity"] = "; ".join(spread(line.perplexity(name)) for line in best) or "–"
            means = [line.perplexity(name).mean for line in best]
            row["times dense"] = "; ".join(f"{mean / dense:.2f}" for mean in means if mean and dense) or "–"
            if any(name in run.metrics.distance for run in group.runs):
                row["KL"] = "; ".join(line.shown_distance(name, "kl_divergence") for line in best) or "–"
            row["verdict"] = best[0].shown_verdict(name) if best else verdict.UNUSABLE
            row["calibrate + prune s"] = "; ".join(shown(line.average(costs.to_prune)) for line in best) or "–"
            row["next"] = f"{after[0].name} {spread(after[0].perplexity(name))}" if after else "–"
            rows.append(row)
            if best:
                where = f"At {size} on {short}"
                closer += _closer(here, best, name, where) + _left_out(here, best, name, where)
                tied = tied or len(best) > 1
    if not rows:
        none = TRAINED if group.runs and not untrained else "No run reached its ratio and was evaluated."
        return Section("Best per ratio", [f"Nothing is ranked. {none}"])
    if tied:
        closer.insert(0, TIED)
    elif not repeated(group):
        closer.insert(0, ONCE)
    ranked = "Lowest perplexity among the usable runs of Table 1 that reached their ratio; other tables are not ranked."
    text = [*not_held_out(group.runs), ranked, *closer]
    text += [TRAINED] if len(untrained) < len(group.runs) else []
    return Section("Best per ratio", text, [("", table(rows))])


def _closer(lines: Sequence[Repeats], best: Sequence[Repeats], name: str, where: str) -> list[str]:
    """A sentence where another usable system is nearer to the dense model than those with the lowest perplexity."""

    def divergence(line: Repeats) -> float:
        mean = line.distance(name, "kl_divergence").mean
        return math.inf if mean is None or line.verdict(name) == verdict.UNUSABLE else mean

    nearest = min(lines, key=divergence)
    if nearest in best or not divergence(nearest) < min(map(divergence, best)):
        return []
    least, own = (one.shown_distance(name, "kl_divergence") for one in (nearest, min(best, key=divergence)))
    return [
        f"{where}, {best[0].name} has the lowest perplexity, but what {nearest.name} predicts is closer to the dense "
        f"model (KL {least} against {own}). Perplexity counts the next token alone, KL every token that could come."
    ]


def _left_out(lines: Sequence[Repeats], best: Sequence[Repeats], name: str, where: str) -> list[str]:
    """A sentence where the lowest perplexity is that of an unusable system."""
    known = [(mean, line) for line in lines if (mean := line.perplexity(name).mean) is not None]
    lowest = min(known, key=lambda one: one[0], default=None)
    if lowest is None or lowest[0] >= min(line.perplexity(name).mean or math.inf for line in best):
        return []
    mean, line = lowest
    return [f"{where}, {line.name} has a lower perplexity, {number(mean)}, but is {line.shown_verdict(name)}."]


def _results(index: int, group: Group) -> Section:
    size, lines = sample_size(group), repeats(group.all)
    how = f", calibrated on {size}" if size else ""
    title = f"Table {index}: {public_name(group.all[0].metrics.method.base_model)}{how}"
    near = [line for line in lines if line.first not in group.other_ratio]
    apart = [line for line in lines if line.first in group.other_ratio]
    found = [("", results(near, group))] if near else []
    if apart:
        caption = "At another achieved ratio than the one requested; compare with the achieved ratio in mind"
        found.append((caption, results(apart, group, dense=not near)))
    tables = [(caption, frame.drop(columns=[*COSTS], errors="ignore")) for caption, frame in found]
    if (far := distances(lines, group)) is not None:
        written = ", and continuations" if "equal tokens" in far else ""
        tables.append((f"Distance from the dense model{written}", far))
    every = pd.concat([frame for _, frame in found])
    tables.append(("Size and cost", every[["system", "ratio", *every.columns.intersection(COSTS, sort=False)]]))
    apart_from = ["Not comparable with Table 1: the audit below says in what they differ."] if index > 1 else []
    return Section(title, [setting(group), *apart_from], tables)


def _recovery(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row per run that trained what another run had pruned, and evaluation set."""
    rows = []
    for run in runs:
        if run.recovery is None:
            continue
        for name in run.sets:
            dense, before, after = run.dense(name), run.recovery.perplexity.get(name), run.perplexity(name)
            row = {"system": f"{run.label}/{run.folder.name}", "from": run.recovery.parent_label}
            row |= {"ratio": run.size, "set": name, "dense": number(dense), "pruned": number(before)}
            row |= {"recovered": number(after), "regained": share(regained(dense, before, after))}
            row |= {"tokens seen": f"{run.recovery.tokens_seen:,}", "train s": f"{run.recovery.seconds:,.0f}"}
            rows.append(row)
    return rows


def continuations(audit: Audit) -> list[tuple[str, pd.DataFrame]]:
    """Continuations of the same prompts by systems of one size, side by side: a table per size, a row per prompt."""
    tables = []
    for group in audit.groups:
        for size, here in by_size(repeats(group.all)).items():
            written = {line.name: line.first.metrics.continuations for line in here}
            told = {name: one.examples for name, one in written.items() if one is not None}
            rows: dict[str, dict[str, str]] = {}
            for name, examples in told.items():
                for one in examples:
                    rows.setdefault(one.prompt, {"prompt": one.prompt, "dense": one.dense})[name] = one.pruned
            if rows:
                caption = f"At {percent(size)}, greedy; a part of the evaluation text."
                blank = {"prompt": "", "dense": "", **dict.fromkeys(told, "–")}
                tables.append((caption, table([blank | row for row in rows.values()])))
    return tables


def terminal(parts: Sequence[Section]) -> str:
    """Plain text with aligned tables."""
    lines: list[str] = []
    for part in parts:
        lines += ["", plain(part.heading)]
        for caption, frame in part.tables:
            lines += [plain(caption)] if caption else []
            lines.append(text_table(frame))
        lines += [*map(plain, part.text), *(f"  - {plain(item)}" for item in part.bullets)]
    return "\n".join(lines[1:])


def markdown(title: str, parts: Sequence[Section]) -> str:
    """One Markdown page; nothing in a section is taken as Markdown."""
    blocks = [f"# {escaped(title)}"]
    for part in parts:
        blocks.append(f"## {escaped(part.heading)}")
        for caption, frame in part.tables:
            blocks += [f"**{escaped(caption)}**"] if caption else []
            blocks.append(text_table(frame.rename(columns=escaped).map(escaped), "pipe"))
        blocks += map(escaped, part.text)
        if part.bullets:
            blocks.append("\n".join(f"- {escaped(item)}" for item in part.bullets))
    return "\n\n".join(blocks) + "\n"
