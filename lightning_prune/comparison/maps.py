"""Heat maps of the report: what every layer keeps, and how far methods agree. Every cell is a mark with its value."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from lightning_prune.checkpoint.scores import Scores
from lightning_prune.comparison.agreement import Floats
from lightning_prune.comparison.run import Run
from lightning_prune.comparison.style import DARK, WIDTH, new_figure, shown, tip
from lightning_prune.comparison.tables import display_names
from lightning_prune.models.vocabulary import Block

COLOURS = matplotlib.colormaps["cividis"]
BLOCKS = (Block.ATTENTION, Block.MLP)


def kept_figure(runs: Sequence[Run]) -> Figure:
    """Kept fraction by layer: a map per block, a row per run, so that methods stand under each other."""
    names, depth = display_names(runs), max(run.units.num_layers for run in runs)
    figure, pair = new_figure(2 * (0.2 * len(runs) + 0.35) + 1.1, rows=2, sharex=True)
    labels = [names[id(run)] for run in runs]
    for axes, block in zip(pair, BLOCKS, strict=True):
        for row, run in enumerate(runs):
            for layer, value in enumerate(kept_fraction(run.units, block)):
                _cell(axes, layer - 0.5, row, value, 0.0, f"{labels[row]}, layer {layer}, {block}: {value:.1%} kept")
        _frame(axes, (-0.5, depth - 0.5), len(runs), labels)
        axes.set_title(block, fontsize=10, loc="left", pad=3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    pair[-1].set_xlabel("layer")
    scale = ScalarMappable(Normalize(0, 1), COLOURS)
    bar = figure.colorbar(scale, ax=pair, label="kept fraction", orientation="horizontal", aspect=40, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.set_facecolor("none")
    return figure


def kept_fraction(table: Scores, block: Block) -> Floats:
    """Share of a block's units that stay ``[L]``; a layer unit counts as both blocks. NaN where there are none."""
    return table.kept_fraction(Block.LAYER if table.whole_layers else block)


def matrix_figure(labels: Sequence[str], values: Floats, title: str, low: float) -> Figure:
    """A symmetric matrix ``[R, R]`` between ``low`` and 1 with its numbers; – where two runs cannot be compared."""
    count = len(labels)
    figure, (axes,) = new_figure(min(WIDTH, 0.5 * count + 1.9))
    for row, column in np.ndindex(count, count):
        value = float(values[row, column])
        text = "–" if np.isnan(value) else f"{value:.2f}"
        told = "not comparable" if np.isnan(value) else f"{value:.4f}"
        _cell(axes, column, row, value, low, f"{labels[row]} and {labels[column]}: {told}")
        dark = (value - low) / (1 - low) < 0.55
        color = "white" if dark and not np.isnan(value) else DARK if not np.isnan(value) else "black"
        size = min(9.0, 64 / count)
        mark = axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=color)
        tip(mark, f"{labels[row]} and {labels[column]}: {told}")
        mark.set_in_layout(False)
    _frame(axes, (0, count), count, labels)
    axes.set_xticks(np.arange(count) + 0.5, [shown(label) for label in labels], rotation=45, ha="right", fontsize=9)
    axes.set_aspect("equal")
    figure.suptitle(title, fontsize=10)
    return figure


def _cell(axes: Axes, x: float, y: float, value: float, low: float, text: str) -> None:
    color = "none" if np.isnan(value) else COLOURS((value - low) / (1 - low))
    # The line in the same colour closes the gaps that a browser leaves between neighbours.
    cell = Rectangle((x, y), 1, 1, facecolor=color, edgecolor=color, linewidth=0.4)
    cell.set_in_layout(False)
    tip(cell, text)
    axes.add_artist(cell)


def _frame(axes: Axes, across: tuple[float, float], count: int, labels: Sequence[str]) -> None:
    axes.set_xlim(*across)
    axes.set_ylim(count, 0)
    axes.set_yticks(np.arange(count) + 0.5, [shown(label) for label in labels], fontsize=9)
    axes.tick_params(length=0)
    axes.grid(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
