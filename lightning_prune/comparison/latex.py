"""``results.tex``: booktabs tables, one per group of comparable runs, and one more where accuracy was measured."""

from collections.abc import Sequence

from lightning_prune.comparison import accuracy
from lightning_prune.comparison.audit import Audit, Group
from lightning_prune.comparison.repeats import Repeats, repeats, seeds
from lightning_prune.comparison.run import Run
from lightning_prune.comparison.tables import display_names, evaluation_sets, number
from lightning_prune.runs.verdict import UNUSABLE
from lightning_prune.support.escape import latex as escape
from lightning_prune.support.escape import public_name


def latex(audit: Audit) -> str:
    """Systems down, ratios across, one ``table`` per group; needs ``\\usepackage{booktabs}``."""
    parts = ["% Needs \\usepackage{booktabs}. Perplexity, lower is better. Unusable: see calibration_appendix.md."]
    for index, group in enumerate(audit.groups, start=1):
        parts.append(_table(index, group))
        if accuracy.columns(group.all):
            parts.append(_accuracies(index, group))
    return "\n\n".join(parts) + "\n"


def _table(index: int, group: Group) -> str:
    sets, ratios = evaluation_sets(group.all), sorted({run.requested for run in group.all})
    columns = [(name, ratio) for name in sets for ratio in ratios]
    top = [f"\\multicolumn{{{len(ratios)}}}{{c}}{{{escape(name)}}}" for name in sets]
    rules = [f"\\cmidrule(lr){{{2 + i * len(ratios)}-{1 + (i + 1) * len(ratios)}}}" for i in range(len(sets))]
    first = group.all[0]
    dense = [f"\\multicolumn{{{len(ratios)}}}{{c}}{{{number(first.perplexity(name, 'dense'))}}}" for name in sets]
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_caption(group)}}}",
        f"\\label{{tab:pruning-{index}}}",
        f"\\begin{{tabular}}{{l{'r' * len(columns)}}}",
        "\\toprule",
        " & ".join(["", *top]) + r" \\",
        *rules,
        " & ".join(["System", *(f"{ratio * 100:g}\\,\\%" for _, ratio in columns)]) + r" \\",
        "\\midrule",
        " & ".join(["Dense", *dense]) + r" \\",
        "\\midrule",
        *_lines(group.runs, columns),
    ]
    if group.other_ratio:
        note = f"\\multicolumn{{{1 + len(columns)}}}{{l}}{{\\emph{{At another achieved ratio (in parentheses):}}}} \\\\"
        lines += ["\\midrule", note, *_lines(group.other_ratio, columns, show_ratio=True)]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"])


def _accuracies(index: int, group: Group) -> str:
    """Ratios and systems down, tasks across."""
    first, headings = group.all[0], accuracy.columns(group.all)
    caption = f"Accuracy of {public_name(first.base_model)} after pruning. {accuracy.LEGEND}"
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{escape(caption)}}}",
        f"\\label{{tab:accuracy-{index}}}",
        f"\\begin{{tabular}}{{lr{'r' * len(headings)}}}",
        "\\toprule",
        " & ".join(["System", "Ratio", *map(escape, headings)]) + r" \\",
        "\\midrule",
        " & ".join(["Dense", "", *_accuracy(group.all[:1], group, dense=True)]) + r" \\",
        "\\midrule",
    ]
    found = sorted(repeats(group.all), key=lambda line: line.first.requested)
    names = display_names([line.first for line in found])
    for line in found:
        first = line.first
        cells = _accuracy(line.runs, group)
        lines.append(" & ".join([escape(names[id(first)]), f"{first.requested * 100:g}\\,\\%", *cells]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"])


def _accuracy(runs: Sequence[Run], group: Group, dense: bool = False) -> list[str]:
    cells = accuracy.cells(runs, group.all, dense)
    return [cell.replace("±", r"$\pm$").replace("–", "--") for cell in cells]


def _lines(runs: list[Run], columns: list[tuple[str, float]], show_ratio: bool = False) -> list[str]:
    found = repeats(runs)
    names = display_names([line.first for line in found])
    lines = []
    for label in dict.fromkeys(names.values()):
        mine = {line.first.requested: line for line in found if names[id(line.first)] == label}
        cells = [_cell(mine.get(ratio), name, show_ratio) for name, ratio in columns]
        lines.append(" & ".join([escape(label), *cells]) + r" \\")
    return lines


def _cell(line: Repeats | None, name: str, show_ratio: bool) -> str:
    if line is None or name not in line.sets:
        return "--"
    found = line.perplexity(name)
    value = number(found.mean)
    if found.deviation is not None:
        value += f" $\\pm$ {number(found.deviation)}"
    if line.verdict(name) == UNUSABLE:
        value = "unusable" if found.mean is None else f"unusable, {value}"
    achieved = line.average(lambda run: run.achieved) or 0.0
    return value + (f" ({achieved * 100:.1f}\\,\\%)" if show_ratio else "")


def _caption(group: Group) -> str:
    first = group.all[0]
    lengths = sorted({str(manifest.get("seq_len")) for manifest in first.evaluation.values()})
    text = f"Perplexity of {public_name(first.base_model)} after pruning"
    if lengths:
        text += f" (windows of {', '.join(lengths)} tokens)"
    calibrated = group.calibration
    if calibrated is not None:
        text += f"; calibration: {public_name(str(calibrated['dataset']))}, {calibrated['num_samples']} samples of "
        text += f"{calibrated['seq_len']} tokens, "
        if any(len(line.runs) > 1 for line in repeats(group.all)):
            drawn = seeds(group.all)
            text += f"mean ± sample standard deviation over seeds {', '.join(map(str, drawn))} (n = {len(drawn)})"
            if any(run.calibration is None for run in group.all):
                text += ", systems that read no data once"
        else:
            text += f"fingerprint {str(calibrated['fingerprint'])[:12]}"
    return escape(text + ".")
