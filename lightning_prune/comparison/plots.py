"""Importance by layer and seconds by phase; every function takes runs and returns a matplotlib figure."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightning_prune.checkpoint.scores import Scores
from lightning_prune.comparison import costs
from lightning_prune.comparison.agreement import Floats
from lightning_prune.comparison.run import Run
from lightning_prune.comparison.style import PALETTE, SOFT, Styles, legend, new_figure, shown, tip
from lightning_prune.comparison.tables import display_names


def importance_figure(runs: Sequence[Run], styles: Styles) -> Figure:
    """Share of the model's whole importance that lies in each layer, one line per system."""
    names, (figure, (axes,)) = display_names(runs), new_figure(3.9)
    for run in sorted(runs, key=lambda run: list(styles).index(names[id(run)])):
        label, share = names[id(run)], importance_share(run.units)
        axes.plot(np.arange(len(share)), share, label=shown(label), markersize=4, linewidth=1.4, **styles[label])
        for layer, value in enumerate(share):
            mark = axes.plot([layer], [value], markersize=4, **styles[label])[0]
            mark.set_in_layout(False)
            tip(mark, f"{label}, layer {layer}: {value:.2%} of its importance")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %"))
    axes.set_xlabel("layer")
    axes.set_ylabel("share of importance")
    legend(figure, axes)
    return figure


def importance_share(table: Scores) -> Floats:
    """Each layer's share of the model's whole importance ``[L]``; zeros where there is none."""
    return table.per_layer(table.importance) / (table.importance.sum() or 1.0)


def seconds_figure(runs: Sequence[Run]) -> Figure:
    """Wall-clock seconds of calibrating, pruning and evaluating, one stacked bar per run.

    A calibration that another run made is hatched: this run did not wait for it, but could not do without it. The
    dense model's evaluation, loading and tokenising are no cost of a method and left out.
    """
    names = display_names(runs)
    figure, (axes,) = new_figure(0.24 * len(runs) + 1.4)
    bars, start = [f"{names[id(run)]} {run.requested:g}" for run in runs], np.zeros(len(runs))
    reused = [run.reused_scores for run in runs]
    calibrated = np.array([costs.calibration(run) or 0.0 for run in runs])
    pruned = np.array([costs.pruning(run) or 0.0 for run in runs])
    evaluated = np.array([costs.spent(run, costs.EVALUATE) or 0.0 for run in runs])
    own = np.where(reused, 0.0, calibrated)
    parts: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("calibrate", own, {"color": PALETTE[0]}),
        (
            "calibrate, in an earlier run",
            calibrated - own,
            {"facecolor": "none", "edgecolor": PALETTE[0], "hatch": "////"},
        ),
        ("prune", pruned, {"color": PALETTE[1]}),
        ("evaluate", evaluated, {"color": SOFT}),
    )
    for label, width, style in parts:
        if width.any():
            drawn = axes.barh(np.arange(len(runs)), width, left=start, label=label, height=0.7, **style)
            for name, bar in zip(bars, drawn, strict=True):
                tip(bar, f"{name}: {label} {bar.get_width():,.1f} s")
        start += width
    axes.set_yticks(np.arange(len(runs)), [shown(bar) for bar in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    legend(figure, axes)
    return figure
