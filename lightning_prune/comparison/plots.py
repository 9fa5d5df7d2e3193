"""The report's figures; every function takes runs and returns a matplotlib figure."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lightning_prune.comparison import costs
from lightning_prune.comparison.agreement import Agreement
from lightning_prune.comparison.run import Run
from lightning_prune.comparison.style import PALETTE, SETTINGS, Styles
from lightning_prune.comparison.tables import display_names
from lightning_prune.escape import figure as figure_text
from lightning_prune.escape import plain
from lightning_prune.runs.verdict import unusable_limit

LONGEST = 40  # characters of a name in a figure
LOG_RANGE = 10  # perplexities further apart than this factor get a logarithmic axis


def perplexity_figure(runs: Sequence[Run], name: str, styles: Styles) -> Figure:
    """Perplexity on evaluation set ``name`` over the achieved ratio, one line per system, dense as reference."""
    names, figure, axes = display_names(runs), *_figure(6.4, 3.9)
    runs = [run for run in runs if name in run.sets]
    dense = next((run.perplexity(name, "dense") for run in runs if run.perplexity(name, "dense")), None)
    unigram = next((run.unigram_perplexity(name) for run in runs), None)
    values = [value for value in (dense, *(run.perplexity(name) for run in runs)) if value is not None]
    for label in [label for label in styles if label in names.values()]:
        points = [(run.achieved, run.perplexity(name)) for run in runs if names[id(run)] == label]
        finite = sorted((x, y) for x, y in points if y is not None)
        x, y = [point[0] for point in finite], [point[1] for point in finite]
        axes.plot(x, y, label=_shown(label), markersize=5, linewidth=1.4, **styles[label])
    if dense is not None:
        axes.axhline(dense, color="#555555", linewidth=1, linestyle=(0, (4, 3)), label=f"dense ({dense:.2f})")
    limit = unusable_limit(dense, unigram)
    if limit is not None and values and max(values) > limit / 3:
        axes.axhline(limit, color="#999999", linewidth=1, linestyle=":", label=f"unusable from {limit:.3g}")
    if values and max(values) / min(values) > LOG_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %"))
    axes.set_xlabel("achieved pruning ratio (share of all parameters)")
    axes.set_ylabel(_shown(f"perplexity on {name}"))
    _legend(figure, axes)
    return figure


def importance_figure(runs: Sequence[Run], styles: Styles) -> Figure:
    """Share of the model's whole importance that lies in each layer, one line per system."""
    names, figure, axes = display_names(runs), *_figure(6.4, 3.6)
    for run in sorted(runs, key=lambda run: list(styles).index(names[id(run)])):
        table, label = run.units, names[id(run)]
        share = table.per_layer(table.importance) / (table.importance.sum() or 1.0)
        axes.plot(np.arange(len(share)), share, label=_shown(label), markersize=4, linewidth=1.4, **styles[label])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %"))
    axes.set_xlabel("layer")
    axes.set_ylabel("share of importance")
    _legend(figure, axes)
    return figure


def kept_figure(runs: Sequence[Run]) -> Figure:
    """Kept fraction, layer × block, one row of maps per run; a layer unit counts as both of its blocks."""
    names, depth = display_names(runs), max(run.units.num_layers for run in runs)
    with matplotlib.rc_context(SETTINGS):
        height = 0.75 * len(runs) + 0.9
        figure = Figure(figsize=(max(6.4, 0.28 * depth + 2.6), height), layout="constrained")
        grid = figure.subplots(len(runs), 1, squeeze=False, sharex=True)[:, 0]
    mesh: Any = None
    for axes, run in zip(grid, runs, strict=True):
        table = run.units
        kept = []
        for block in ("attention", "mlp"):
            rows = None if table.whole_layers else block
            count = table.per_layer(np.ones(len(table.layer)), rows)
            kept.append(table.per_layer(table.kept.astype(np.float64), rows) / np.maximum(count, 1))
        mesh = axes.pcolormesh(
            np.arange(table.num_layers + 1) - 0.5, np.arange(3), np.array(kept), vmin=0, vmax=1, cmap="cividis"
        )
        axes.set_yticks([0.5, 1.5], ["attention", "mlp"], fontsize=8)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_title(_shown(names[id(run)]), fontsize=9, loc="left", pad=2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[-1].set_xlabel("layer")
    figure.colorbar(mesh, ax=list(grid), label="kept fraction", aspect=8 * max(1.0, height / 2))
    return figure


def matrix_figure(agreement: Agreement, what: str) -> Figure:
    """``spearman`` and ``jaccard`` side by side with their values; – where two runs cannot be compared."""
    count, labels = len(agreement.labels), [_shown(label) for label in agreement.labels]
    with matplotlib.rc_context(SETTINGS):
        size = 0.52 * count
        figure = Figure(figsize=(2 * size + 3.4, size + 2.2), layout="constrained")
        pair = figure.subplots(1, 2, sharey=True)
    for axes, values, title, low in zip(
        pair,
        (agreement.spearman, agreement.jaccard),
        (f"rank correlation of {what}\n(Spearman)", "overlap of what is kept\n(Jaccard)"),
        (-1, 0),
        strict=True,
    ):
        axes.pcolormesh(np.arange(count + 1), np.arange(count + 1), values, vmin=low, vmax=1, cmap="cividis")
        for row, column in np.ndindex(count, count):
            value = values[row, column]
            dark = (value - low) / (1 - low) < 0.55
            text = "–" if np.isnan(value) else f"{value:.2f}"
            color = "white" if dark else "black"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(np.arange(count) + 0.5, labels, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(np.arange(count) + 0.5, labels, fontsize=8)
        axes.set_aspect("equal")
        axes.grid(False)
        axes.set_title(title, fontsize=9)
    pair[0].invert_yaxis()  # shared
    return figure


def seconds_figure(runs: Sequence[Run]) -> Figure:
    """Wall-clock seconds of calibrating, pruning and evaluating, one stacked bar per run.

    A calibration that another run made is hatched: this run did not wait for it, but could not do without it. The
    dense model's evaluation, loading and tokenising are no cost of a method and left out.
    """
    names = display_names(runs)
    figure, axes = _figure(6.4, 0.27 * len(runs) + 1.6)
    bars, start = [_shown(f"{names[id(run)]} {run.requested:g}") for run in runs], np.zeros(len(runs))
    reused = [run.reused_scores for run in runs]
    calibrated = np.array([costs.calibration(run) or 0.0 for run in runs])
    pruned = np.array([costs.pruning(run) or 0.0 for run in runs])
    evaluated = np.array([costs.spent(run, costs.EVALUATE) or 0.0 for run in runs])
    own = np.where(reused, 0.0, calibrated)
    parts: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("calibrate", own, {"color": PALETTE[0]}),
        (
            "calibrate, by the run\nwhose scores were reused",
            calibrated - own,
            {"facecolor": "white", "edgecolor": PALETTE[0], "hatch": "////"},
        ),
        ("prune", pruned, {"color": PALETTE[1]}),
        ("evaluate", evaluated, {"color": "#BBBBBB"}),
    )
    for label, width, style in parts:
        if width.any():
            axes.barh(np.arange(len(runs)), width, left=start, label=label, height=0.7, **style)
        start += width
    axes.set_yticks(np.arange(len(runs)), bars, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    _legend(figure, axes)
    return figure


def _shown(text: str) -> str:
    """``text`` for a figure, its middle left out where it would take the place of the axes."""
    line = plain(text)
    return figure_text(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]}…{line[1 - LONGEST // 2 :]}")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes) -> None:
    """Beside the axes, where it covers no data."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
