"""The report's plots: quality against size, cost and speed, what every layer keeps, and how far methods agree."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_prune.comparison.audit import Audit
from lightning_prune.comparison.costs import to_prune
from lightning_prune.comparison.repeats import Repeats, repeats
from lightning_prune.comparison.selection import Floats, agreement, kept_fraction
from lightning_prune.comparison.tables import evaluation_sets
from lightning_prune.models.vocabulary import ROLES_OF
from lightning_prune.runs.verdict import unusable_limit
from lightning_prune.support.escape import figure as escape
from lightning_prune.support.escape import plain

# Okabe & Ito's palette, told apart with every common colour blindness; yellow is left out, too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
LONGEST = 30  # characters of a name in a figure
WIDTH, HEIGHT = 4.6, 3.9  # inches; at 96 to the inch hardly wider than a phone, so that text keeps its size there
BEYOND = 2  # times the limit of the unusable: where the perplexity axis ends
SETTINGS = {"axes.spines.top": False, "axes.spines.right": False}
EDGE = "Lower is better; what is beyond the scale is drawn on its upper edge. A reused calibration counts in full."
Styles = dict[str, dict[str, Any]]

AGAINST: tuple[tuple[str, str, Callable[[Repeats], float | None]], ...] = (
    ("size", "achieved pruning ratio", lambda line: line.average(lambda run: run.achieved)),
    ("seconds", "seconds to calibrate and prune", lambda line: line.average(to_prune)),
)


@dataclass(frozen=True)
class Plot:
    """A figure under a heading; ``tag`` is its name in TensorBoard."""

    heading: str
    tag: str
    caption: str
    figure: Figure


def tag(number: int, ratio: float | None = None) -> str:
    """The group of TensorBoard's tags for a table of the report, at one ratio or at all."""
    table = f" table {number}" if number > 1 else ""
    return f"comparison{table}" + ("" if ratio is None else f" {ratio * 100:g} %")


def plots(audit: Audit) -> Iterator[Plot]:
    """Everything the runs allow, table by table. Where seeds were repeated, perplexities are means with their
    deviation, and everything else is of the lowest seed."""
    for number, group in enumerate(audit.groups, start=1):
        lines = repeats(group.all)
        marks = zip(dict.fromkeys(line.name for line in lines), cycle(PALETTE), cycle(MARKERS))
        styles: Styles = {name: {"color": color, "marker": marker} for name, color, marker in marks}
        where = f" (Table {number})" if len(audit.groups) > 1 else ""
        for name, short in evaluation_sets(group.all).items():
            for what, label, x in AGAINST:
                figure = quality_figure(lines, name, short, styles, x, label)
                yield Plot(f"Quality{where}", f"{tag(number)}/perplexity and {what}/{name}", EDGE, figure)
        for ratio in sorted({line.ratio for line in lines}):
            heading, key = f"At a ratio of {ratio * 100:g} %{where}", tag(number, ratio)
            here = [line for line in lines if line.ratio == ratio]
            caption = "Share of attention groups and MLP channels that is kept in every layer."
            yield Plot(heading, f"{key}/kept fraction", caption, kept_figure(here))
            ranking = [line for line in here if not line.first.units.whole_layers]
            if len(ranking) > 1:
                labels = [line.name for line in ranking]
                spearman, overlap = agreement([line.first for line in ranking])
                caption = "Spearman's rank correlation of scores; – where two methods do not rank the same units."
                yield Plot(heading, f"{key}/agreement/scores", caption, matrix_figure(labels, spearman, "scores", -1))
                caption = "Jaccard index of the kept units: the share of what either keeps that both keep."
                yield Plot(heading, f"{key}/agreement/kept", caption, matrix_figure(labels, overlap, "kept units", 0))


def quality_figure(
    lines: Sequence[Repeats], name: str, short: str, styles: Styles, x: Callable[[Repeats], float | None], label: str
) -> Figure:
    """Perplexity on evaluation set ``name`` over ``x``, a curve per system, with the dense model and the limit of the
    unusable. Perplexities that are not finite or far beyond that limit are on the upper edge."""
    figure, (axes,) = _new(HEIGHT)
    points = [(at, line) for line in lines if name in line.sets and (at := x(line)) is not None]
    known = [mean for _, line in points if (mean := line.perplexity(name).mean) is not None]
    first = points[0][1].first if points else None
    dense = None if first is None else first.dense(name)
    limit = None if first is None else unusable_limit(dense, first.metrics.evaluation[name].unigram_perplexity)
    top = min(1.2 * max(known, default=limit or 1.0), BEYOND * (limit or math.inf))
    for system, style in styles.items():
        mine = sorted(
            ((at, line.perplexity(name)) for at, line in points if line.name == system), key=lambda one: one[0]
        )
        if mine:
            heights = [top if spread.mean is None else min(spread.mean, top) for _, spread in mine]
            deviations = [spread.deviation or 0.0 for _, spread in mine]
            axes.errorbar([at for at, _ in mine], heights, deviations, label=_shown(system), capsize=4, **style)
    for value, dashes, what in ((dense, "--", "dense"), (limit, ":", "unusable from")):
        if value is not None and value <= top:
            axes.axhline(value, color="#808080", linewidth=1, linestyle=dashes, label=f"{what} {value:.4g}")
    axes.set_ylim(top=1.02 * top)
    axes.set_xlabel(label)
    axes.set_ylabel(_shown(f"perplexity on {short}"))
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if max(map(len, labels), default=0) <= 14 else 1
    # Below the axes, where it covers no data and takes no width.
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
    return figure


def kept_figure(lines: Sequence[Repeats]) -> Figure:
    """Kept fraction by layer: a map per block, a row per run."""
    figure, pair = _new(2 * (0.2 * len(lines) + 0.35) + 1.1, rows=2)
    for axes, block in zip(pair, ROLES_OF, strict=True):
        cells = np.stack([kept_fraction(line.first, block) for line in lines])
        image = axes.imshow(cells, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(lines)), [_shown(line.name) for line in lines], fontsize=9)
        axes.set_title(block, fontsize=10, loc="left", pad=3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    pair[-1].set_xlabel("layer")
    figure.colorbar(image, ax=pair, label="kept fraction", orientation="horizontal", aspect=40, pad=0.02)
    return figure


def matrix_figure(labels: Sequence[str], values: Floats, title: str, low: float) -> Figure:
    """A symmetric matrix ``[R, R]`` between ``low`` and 1 with its numbers; – where two runs cannot be compared."""
    count, names = len(labels), [_shown(label) for label in labels]
    figure, (axes,) = _new(min(WIDTH, 0.5 * count + 1.9))
    axes.imshow(values, cmap="cividis", vmin=low, vmax=1, interpolation="nearest")
    for (row, column), value in np.ndenumerate(values):
        color = "white" if (value - low) / (1 - low) < 0.55 else "black"
        text = "–" if np.isnan(value) else f"{value:.2f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=min(9.0, 64 / count), color=color)
    axes.set_yticks(range(count), names, fontsize=9)
    axes.set_xticks(range(count), names, rotation=45, ha="right", fontsize=9)
    axes.set_title(title, fontsize=10)
    return figure


def _new(height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, list(figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0])


def _shown(text: str) -> str:
    """``text`` for a figure, its middle left out where it would take the place of the axes."""
    line = plain(text)
    return escape(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]}…{line[1 - LONGEST // 2 :]}")
