"""How every plot of the report looks: palette, line styles, what a mark says, and the way to inline SVG.

Figures are drawn for TensorBoard (PNG on white) and for the page (SVG, light or dark). On the page black is the
page's ink, whatever that is; ``DARK`` is black on both, for text on a coloured cell.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_prune.support.escape import figure as figure_text
from lightning_prune.support.escape import plain

# Okabe & Ito's palette, told apart with every common colour blindness; yellow is left out, too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
INK, DARK, SOFT = "#000000", "#010101", "#808080"
Styles = dict[str, dict[str, Any]]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
DASHES = ("-", "--", ":", "-.")
LONGEST = 40  # characters of a name in a figure
WIDTH = 4.6  # inches; at 96 to the inch hardly wider than a phone, so that text keeps its size there
DPI = 110  # of images
TIP = "tip:"
SETTINGS = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.alpha": 0.3,
    "svg.hashsalt": "lightning-prune",
    "svg.fonttype": "none",
}


def line_styles(labels: Sequence[str]) -> Styles:
    """Colour, marker and dash by label. Made once per report, so that a system looks the same in every plot."""
    return {
        label: {
            "color": PALETTE[index % len(PALETTE)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": DASHES[index // len(PALETTE) % len(DASHES)],
        }
        for index, label in enumerate(labels)
    }


def new_figure(height: float, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of ``height`` inches with ``rows`` axes below each other."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, list(figure.subplots(rows, 1, squeeze=False, **options)[:, 0])


def legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, where it covers no data and takes no width."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        longest = max(map(len, labels))
        columns = 3 if longest <= 14 else 2 if longest <= 26 else 1
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)


def shown(text: str) -> str:
    """``text`` for a figure, its middle left out where it would take the place of the axes."""
    line = plain(text)
    return figure_text(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]}…{line[1 - LONGEST // 2 :]}")


def tip(artist: Artist, text: str) -> None:
    """What ``artist`` says on the page when it is pointed at."""
    artist.set_gid(TIP + plain(text))


def svg(figure: Figure, key: str) -> str:
    """The figure as an ``<svg>`` element for an HTML page: no prolog, no metadata, no address anywhere.

    Black is left to the page's style sheet, and what ``tip`` said becomes the ``<title>`` of its mark.

    Args:
        figure: what to draw.
        key: begins the names of the figure's parts, so that no other figure on the page has the same.
    """
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    text = _saved(figure, format="svg", metadata=metadata).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would hold for every plot of the page
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub(rf'<g id="{TIP}([^"]*)"', r'<g class="mark"><title>\1</title', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same names in every figure, and nothing refers to them
    text = re.sub(r'(\sid="|xlink:href="#|url\(#)', rf"\g<1>{key}-", text)
    return text.replace(f"stroke: {INK}", "stroke: var(--ink)").replace(f"fill: {INK}", "fill: var(--ink)")


def png(figure: Figure) -> bytes:
    """The figure as an image on white."""
    return _saved(figure, format="png", dpi=DPI, facecolor="white")


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(buffer, **options)
    figure.set_layout_engine("none")  # it is laid out now, for every other format too
    return buffer.getvalue()
