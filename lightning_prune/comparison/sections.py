"""The report's text and tables, before any format: the terminal, Markdown and HTML show the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_prune.comparison import accuracy, costs, precision, priors, recovery
from lightning_prune.comparison.audit import Audit
from lightning_prune.comparison.conclusion import conclusion
from lightning_prune.comparison.differences import summary
from lightning_prune.comparison.names import short_names
from lightning_prune.comparison.repeats import repeats, seeds
from lightning_prune.comparison.run import Run
from lightning_prune.comparison.tables import (
    Row,
    evaluation_sets,
    header,
    markdown_table,
    rows,
    setting,
    text_table,
    title,
)
from lightning_prune.runs import verdict
from lightning_prune.runs.failure import Failure
from lightning_prune.support.escape import markdown as escaped
from lightning_prune.support.escape import plain


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, bullet points (``fine``: they are no warning), and tables as (name, columns, rows).

    ``hints`` say more about columns by their names; what is ``detail`` stands below the first plots of a page. The
    ``answer`` leads a page, and in a terminal, which is read from its end, it follows the tables.
    """

    heading: str
    text: list[str] = field(default_factory=list)
    bullets: list[str] = field(default_factory=list)
    tables: list[tuple[str, Sequence[str], Sequence[Row]]] = field(default_factory=list)
    fine: bool = False
    hints: dict[str, str] = field(default_factory=dict)
    detail: bool = False
    answer: bool = False


def sections(audit: Audit, failures: Sequence[Failure]) -> list[Section]:
    """The answer, failed runs, tables, then what was checked and what differs."""
    found = [_results(audit, index) for index in range(len(audit.groups))]
    if unusable := _unusable(audit):
        text = (
            "These models have lost at least half of what the dense model gains over token frequencies without "
            "context, or their perplexity is not finite:"
        )
        found.append(Section("Unusable models", [text], unusable, detail=True))
    runs = [run for group in audit.groups for run in group.all]
    if trained := recovery.table(runs):
        found.append(Section("Recovery", [recovery.TEXT], tables=[("", recovery.COLUMNS, trained)], detail=True))
    if agreeing := priors.table(runs):
        found.append(Section("Depth priors", [priors.TEXT], tables=[("", priors.COLUMNS, agreeing)], detail=True))
    if pairs := precision.pairs(runs):
        text = (
            f"Runs beside the run in {precision.FULL} with the same method, options, ratio, base model and "
            "calibration tokens."
        )
        found.append(Section("Precision", [text], tables=[("", *precision.table(pairs))], detail=True))
    if runs:
        legend = [verdict.LEGEND, *_several(runs), *_repeated(audit), *costs.legend(runs)]
        legend += [accuracy.LEGEND] if accuracy.columns(runs) else []
        found.append(Section("How to read the tables", bullets=legend, fine=True, detail=True))
    if failures:
        columns = ("system", "ratio", "error")
        lines = [(failure.label, f"{failure.requested:g}", failure.message) for failure in failures]
        found.insert(0, Section("Failed runs", tables=[("", columns, lines)]))
    if runs:
        found.insert(0, Section("What to trust", conclusion(audit), answer=True))
    if audit.fair:
        text = "Base model, tokenizer, precision, evaluation, calibration tokens and ratio reached agree in all runs."
        found.append(Section("Audit: no differences", [text], audit.notes, fine=True, detail=True))
    else:
        text = "Runs that differ in these facts stand in different tables, or apart within one:"
        found.append(Section("Audit: differences", [text], summary(audit), detail=True))
        if audit.notes:
            found.append(Section("Notes", bullets=audit.notes, fine=True, detail=True))
    return found


def terminal(found: Sequence[Section]) -> str:
    """Plain text with aligned tables."""
    lines: list[str] = []
    # False sorts before True: tables, the answer, details.
    for section in sorted(found, key=lambda section: (section.detail, section.answer)):
        lines += [
            "",
            *map(plain, (section.heading, *section.text)),
            *(f"  - {plain(item)}" for item in section.bullets),
        ]
        for name, columns, body in section.tables:
            lines += [plain(name)] if name else []
            lines.append(text_table(columns, body))
    return "\n".join(lines[1:])


def markdown(report_title: str, found: Sequence[Section]) -> str:
    """``report.md``."""
    parts = [f"# {escaped(report_title)}"]
    for section in found:
        parts += [f"## {escaped(section.heading)}", *map(escaped, section.text)]
        if section.bullets:
            parts.append("\n".join(f"- {escaped(item)}" for item in section.bullets))
        for name, columns, body in section.tables:
            parts += [f"**{escaped(name)}**"] if name else []
            parts.append(markdown_table(columns, body))
    parts.append(
        "Plots are in `report.html`, numbers in `results.csv`, the Methods section's facts in "
        "`calibration_appendix.md`."
    )
    return "\n\n".join(parts) + "\n"


def _results(audit: Audit, index: int) -> Section:
    group = audit.groups[index]
    sets = evaluation_sets(group.all)
    repeated = any(len(line.runs) > 1 for line in repeats(group.all))
    columns = header(sets, repeated, accuracy.columns(group.all))
    warning = ["Not to be compared with Table 1: the audit below says in what they differ."] if group.differs else []
    hints = {f"perplexity {short}": f"perplexity on {name}" for name, short in short_names(sets).items()}
    tables: list[tuple[str, Sequence[str], Sequence[Row]]] = []
    if group.runs:
        tables.append(("", columns, rows(group.runs, sets, group.all, repeated)))
    if group.other_ratio:
        name = "At another achieved ratio than the one asked for; compare with the achieved ratio in mind"
        apart = rows(group.other_ratio, sets, group.all, repeated)
        tables.append((name, columns, apart[1:] if group.runs else apart))
    return Section(title(index + 1, group), [setting(group)], warning, tables, hints=hints)


def _several(runs: Sequence[Run]) -> list[str]:
    """How to read more than one verdict on a line, where there is such a line."""
    differ = any(len({run.verdict(name) for name in run.sets}) > 1 for run in runs)
    return ["Several verdicts on a line stand in the order of the perplexity columns."] if differ else []


def _repeated(audit: Audit) -> list[str]:
    """What ± means, where something was repeated."""
    if all(len(line.runs) == 1 for group in audit.groups for line in repeats(group.all)):
        return []
    return [
        "± is the sample standard deviation over n calibration seeds, around their mean; seconds are means, peak "
        "memory is the largest. What draws no calibration samples runs once. Two systems tie whose means are apart by "
        "no more than √(a² + b²), a and b their deviations: with few seeds these are rough themselves."
    ]


def _unusable(audit: Audit) -> list[str]:
    """A line per system and sets of text on which it is unusable, with the ratios."""
    runs = [run for group in audit.groups for run in group.all]
    short = short_names(evaluation_sets(runs))
    ratios: dict[tuple[str, str], list[str]] = {}
    for label, ratio in sorted({(run.label, run.requested) for run in runs}):
        mine = [run for run in runs if (run.label, run.requested) == (label, ratio)]
        lost = {name for run in mine for name in run.sets if run.verdict(name) == verdict.UNUSABLE}
        if lost:
            where = ", ".join(short[name] for name in short if name in lost)
            several = len(seeds(mine)) > 1
            bad = [run for run in mine if any(run.verdict(name) == verdict.UNUSABLE for name in run.sets)]
            with_seeds = f" (seed {', '.join(map(str, seeds(bad)))})" if several and len(bad) < len(mine) else ""
            ratios.setdefault((label, where), []).append(f"{ratio:g}{with_seeds}")
    return [f"{label} at {', '.join(found)} on {where}" for (label, where), found in sorted(ratios.items())]
