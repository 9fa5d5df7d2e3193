"""How a method's scores are spread, and where it cut."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightning_prune.comparison.agreement import Floats
from lightning_prune.comparison.run import Run
from lightning_prune.comparison.style import PALETTE, legend, new_figure, shown, tip
from lightning_prune.comparison.tables import display_names

BINS = 28
REACH = 3.0  # powers of ten around the median, at most
WITHIN = 0.99  # share of every run's units that the axis covers; what lies beyond is counted at its edge


def score_figure(runs: Sequence[Run]) -> Figure:
    """A histogram per run: units by log10(score / median score), kept ones on top of pruned ones.

    Methods score in units of their own; over their median they share an axis. Scores of 0 or less stand at the left
    edge.
    """
    names = display_names(runs)
    figure, grid = new_figure(0.62 * len(runs) + 1.2, rows=len(runs), sharex=True)
    values = [relative(run) for run in runs]
    reach = max(0.1, min(REACH, max(float(np.quantile(np.abs(found), WITHIN)) for found in values)))
    edges = np.linspace(-reach, reach, BINS + 1)
    for axes, run, found in zip(grid, runs, values, strict=True):
        inside = np.clip(found, -reach, reach)
        pruned = np.histogram(inside[run.units.pruned], edges)[0]
        kept = np.histogram(inside[run.units.kept], edges)[0]
        for label, count, below, color in (
            ("pruned", pruned, np.zeros_like(pruned), PALETTE[1]),
            ("kept", kept, pruned, PALETTE[0]),
        ):
            full = np.flatnonzero(count)
            at, width = edges[full], np.diff(edges)[full]
            bars = axes.bar(at, count[full], width, below[full], align="edge", color=color, label=label)
            for index, bar in zip(full, bars, strict=True):
                bar.set_in_layout(False)
                span = f"{10 ** edges[index]:.3g} to {10 ** edges[index + 1]:.3g} times the median"
                tip(bar, f"{names[id(run)]}, score {span}: {kept[index]:,} units kept, {pruned[index]:,} pruned")
        axes.set_title(shown(names[id(run)]), fontsize=9, loc="left", pad=2)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    grid[-1].xaxis.set_major_locator(MaxNLocator(7, integer=reach >= 1))
    grid[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:.3g}"))
    grid[-1].set_xlabel("score / median score of the run")
    legend(figure, grid[0])
    return figure


def relative(run: Run) -> Floats:
    """log10 of scores over their median ``[U]``; far below everything where a score or the median is not positive."""
    score = run.units.score
    middle = float(np.median(score))
    found = np.full(len(score), -REACH)
    positive = score > 0
    if middle > 0:
        found[positive] = np.log10(score[positive] / middle)
    elif positive.any():
        found[positive] = np.log10(score[positive] / float(np.median(score[positive])))
    return found
