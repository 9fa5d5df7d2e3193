"""How every plot of the report looks: palette, line styles, and the way to inline SVG."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Okabe & Ito's palette, told apart with every common colour blindness; yellow is left out, too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
Styles = dict[str, dict[str, Any]]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
DASHES = ("-", "--", ":", "-.")
SETTINGS = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "svg.hashsalt": "lightning-prune",
    "svg.fonttype": "path",
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


def svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element for an HTML page: no prolog, no metadata, no address anywhere."""
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(
            buffer,
            format="svg",
            bbox_inches="tight",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
