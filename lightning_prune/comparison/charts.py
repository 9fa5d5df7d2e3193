"""The report's charts: quality against size and cost, what every layer keeps, and how far methods agree.

They are Bokeh's, for the page alone: values under the pointer, systems switched by a click on the legend, no network.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from bokeh.embed import json_item
from bokeh.models import BasicTicker, ColumnDataSource, HoverTool, PlainText
from bokeh.models.annotations import Legend, LegendItem
from bokeh.plotting import figure

from lightning_prune.comparison.audit import Audit
from lightning_prune.comparison.costs import to_prune
from lightning_prune.comparison.repeats import Repeats, by_size, percent, repeats
from lightning_prune.comparison.selection import Floats, agreement, kept_fraction
from lightning_prune.comparison.tables import evaluation_sets, shown, spread
from lightning_prune.models.vocabulary import ROLES_OF
from lightning_prune.runs.verdict import unusable_limit
from lightning_prune.support.escape import plain

# Two colours that the page replaces by those of its own scheme, light or dark.
INK, GRID = "#111112", "#dddde1"
# Okabe & Ito's palette, told apart with every common colour blindness; yellow is left out, too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", INK)
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus", "x", "star", "hex")
LONGEST = 30  # characters of a name in a chart
BEYOND = 2  # times the limit of the unusable: where the perplexity axis ends
EDGE = "Lower is better; what is beyond the scale is drawn on its upper edge. A reused calibration counts in full."
Styles = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Chart:
    """A chart under a heading; ``item`` is what ``Bokeh.embed.embed_item`` takes, for the element ``target``."""

    heading: str
    caption: str
    target: str
    item: dict[str, Any]


def charts(audit: Audit) -> list[Chart]:
    """Everything the runs allow, table by table, quality against size first. Where seeds were repeated, perplexities
    are means with their deviation, and everything else is of the lowest seed."""
    drawn = [
        chart for number, group in enumerate(audit.groups, start=1) for chart in _of_group(audit, number, group.all)
    ]
    return [
        Chart(heading, caption, f"chart-{index}", dict(json_item(plot, f"chart-{index}")))  # type: ignore[arg-type]
        for index, (heading, caption, plot) in enumerate(drawn)
    ]


def _of_group(audit: Audit, number: int, runs: Sequence[Any]) -> Iterator[tuple[str, str, Any]]:
    lines, sets = repeats(runs), evaluation_sets(runs)
    marks = zip(dict.fromkeys(line.name for line in lines), cycle(PALETTE), cycle(MARKERS))
    styles = {name: {"color": color, "marker": marker} for name, color, marker in marks}
    where = f" (Table {number})" if len(audit.groups) > 1 else ""
    ratios = {line: line.achieved for line in lines}
    seconds = {line: spent for line in lines if (spent := line.average(to_prune)) is not None}
    for name, short in sets.items():
        yield f"Quality and size{where}", EDGE, quality_chart(ratios, name, short, styles, "pruning ratio")
    for size, here in by_size(lines).items():
        for line in here:
            yield f"Kept by layer at {percent(size)}{where}", plain(line.name), kept_chart(line)
        ranking = [line for line in here if not line.first.units.whole_layers]
        if len(ranking) > 1:
            heading, labels = f"Agreement at {percent(size)}{where}", [line.name for line in ranking]
            spearman, overlap = agreement([line.first for line in ranking])
            caption = "Spearman's rank correlation of scores; – where two methods do not rank the same units."
            yield heading, caption, matrix_chart(labels, spearman, -1)
            caption = "Jaccard index of the kept units: the share of what either keeps that both keep."
            yield heading, caption, matrix_chart(labels, overlap, 0)
    for name, short in sets.items():
        yield f"Quality and cost{where}", EDGE, quality_chart(seconds, name, short, styles, "seconds to prune")


def quality_chart(x: Mapping[Repeats, float], name: str, short: str, styles: Styles, label: str) -> Any:
    """Perplexity on evaluation set ``name`` over ``x`` of each line, a curve per system, with the dense model and the
    limit of the unusable. Perplexities that are not finite or far beyond that limit are on the upper edge."""
    lines = sorted((line for line in x if name in line.sets), key=lambda line: x[line])
    known = [mean for line in lines if (mean := line.perplexity(name).mean) is not None]
    first = lines[0].first if lines else None
    dense = None if first is None else first.dense(name)
    limit = None if first is None else unusable_limit(dense, first.metrics.evaluation[name].unigram_perplexity)
    top = min(1.2 * max(known, default=limit or 1.0), BEYOND * (limit or math.inf))
    plot = _new(label, f"perplexity on {short}", height=480)
    plot.y_range.end = 1.02 * top
    plot.x_range.start = 0  # where the dense model is; runs of one ratio differ by their rounding alone
    items, marks = [], []
    for system, style in styles.items():
        rows = []
        for line in (line for line in lines if line.name == system):
            mean, deviation = line.perplexity(name)
            height, deviation = min(top if mean is None else mean, top), deviation or 0.0
            row: dict[str, Any] = {"x": x[line], "y": height, "low": height - deviation}
            row |= {"high": min(height + deviation, top), "system": plain(system)}
            row |= {"ratio": f"{line.size}, achieved {line.achieved:.4f}", "perplexity": spread(line.perplexity(name))}
            rows.append(row | {"verdict": line.verdict(name), "seconds": shown(line.average(to_prune))})
        if not rows:
            continue
        source, color = ColumnDataSource({key: [row[key] for row in rows] for key in rows[0]}), style["color"]
        drawn = [
            plot.line("x", "y", source=source, color=color, line_width=2),
            plot.segment("x", "low", "x", "high", source=source, color=color),
            plot.scatter("x", "y", source=source, color=color, marker=style["marker"], size=9),
        ]
        marks.append(drawn[-1])
        items.append(LegendItem(label={"value": _shown(system)}, renderers=drawn))
    for value, dashes, what in ((dense, "dashed", "dense"), (limit, "dotted", "unusable from")):
        if value is not None and value <= top:
            drawn = [plot.hspan(y=[value], line_color=INK, line_dash=dashes)]
            items.append(LegendItem(label={"value": f"{what} {value:.4g}"}, renderers=drawn))
    columns = ("system", "ratio", "perplexity", "verdict", "seconds")
    plot.add_tools(HoverTool(renderers=marks, tooltips=[(column, f"@{column}") for column in columns]))
    legend = Legend(items=items, ncols=2, click_policy="hide", border_line_color=None, background_fill_alpha=0.0)
    legend.update(label_text_color=INK, location="left", padding=0)
    plot.add_layout(legend, "below")
    return plot


def kept_chart(line: Repeats) -> Any:
    """Kept fraction of GQA groups and MLP channels by layer, of one system."""
    plot = _new("layer", "kept", height=200)
    plot.xaxis.ticker = BasicTicker(min_interval=1)
    plot.y_range.start, plot.y_range.end = 0, 1.05
    marks = []
    for block, color, marker in zip(ROLES_OF, PALETTE, MARKERS, strict=False):
        kept = kept_fraction(line.first, block)
        source = ColumnDataSource({"layer": np.arange(len(kept)), "kept": kept, "block": [str(block)] * len(kept)})
        plot.line("layer", "kept", source=source, color=color, legend_label=str(block))
        drawn = plot.scatter(
            "layer", "kept", source=source, color=color, marker=marker, size=5, legend_label=str(block)
        )
        marks.append(drawn)
    plot.add_tools(HoverTool(renderers=marks, tooltips=[("layer", "@layer"), ("@block", "@kept{0.0%}")]))
    plot.legend.update(location="bottom_left", label_text_color=INK, background_fill_alpha=0.0, click_policy="hide")
    plot.legend.update(label_text_font_size="10px", spacing=0, padding=2, border_line_color=None)
    return plot


def matrix_chart(labels: Sequence[str], values: Floats, low: float) -> Any:
    """A symmetric matrix ``[R, R]`` between ``low`` and 1 with its numbers; – where two runs cannot be compared."""
    names = [_shown(label) for label in labels]
    if len(set(names)) < len(names):
        names = [f"{index + 1} {name}" for index, name in enumerate(names)]
    plot = _new("", "", height=120 + 34 * len(names), x_range=names, y_range=names[::-1])
    rows, columns = zip(*np.ndindex(values.shape), strict=True)
    flat = values.reshape(-1)
    share = np.where(np.isnan(flat), 0.0, (flat - low) / (1 - low))
    data = {
        "left": [names[row] for row in rows],
        "right": [names[column] for column in columns],
        "text": ["–" if np.isnan(value) else f"{value:.2f}" for value in flat],
        "alpha": 0.06 + 0.84 * share,
        "color": ["#ffffff" if one > 0.6 else INK for one in share],
    }
    source = ColumnDataSource(data)
    cells = plot.rect("right", "left", 1, 1, source=source, color=PALETTE[0], alpha="alpha")
    style = {"text_align": "center", "text_baseline": "middle", "text_font_size": f"{min(12, 96 // len(names))}px"}
    plot.text("right", "left", "text", source=source, color="color", **style)
    plot.add_tools(HoverTool(renderers=[cells], tooltips=[("@left, @right", "@text")]))
    plot.xaxis.major_label_orientation = 0.8
    plot.grid.visible = False
    return plot


def _new(x: str, y: str, height: int, **ranges: Any) -> Any:
    """An empty plot that is as wide as its place on the page."""
    plot = figure(height=height, sizing_mode="stretch_width", tools="", toolbar_location=None, **ranges)
    plot.update(background_fill_color=None, border_fill_color=None, outline_line_color=None)
    for axis, label in ((plot.xaxis, x), (plot.yaxis, y)):
        axis.update(
            axis_label=PlainText(text=_shown(label)), axis_label_text_font_style="normal", minor_tick_line_color=None
        )
        axis.update(
            axis_label_text_color=INK, major_label_text_color=INK, axis_line_color=INK, major_tick_line_color=INK
        )
    plot.grid.grid_line_color = GRID
    return plot


def _shown(text: str) -> str:
    """``text`` for a chart, its middle left out where it would take the place of the axes."""
    line = plain(text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]}…{line[1 - LONGEST // 2 :]}"
