"""``report.html``: one file that opens offline, on a phone too. Nothing in it is loaded from anywhere."""

from collections.abc import Sequence
from itertools import groupby

from lightning_prune.comparison.figures import Plot
from lightning_prune.comparison.sections import Section
from lightning_prune.comparison.style import svg
from lightning_prune.comparison.tables import Row
from lightning_prune.escape import html as escape
from lightning_prune.runs.verdict import UNUSABLE

WORDS = ("verdict", "error")  # columns of text
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #555; white-space: normal; vertical-align: bottom; overflow-wrap: normal; }
.word { text-align: left; } th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: #fff; }
tr.unusable td { color: #8a2b00; } tr.dense td { color: #555; }
.box { border-left: 4px solid #D55E00; padding: .4rem .8rem; background: #fdf4ee; }
.fine { border-color: #009E73; background: #eef8f4; }
figure { margin: 1rem 0; } figure svg { display: block; height: auto; width: 100%; }
figcaption { font-size: .85rem; color: #444; } summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
@media (max-width: 40rem) { body { padding: .6rem; } figure svg { width: auto; min-width: 34rem; } }
"""


def page(title: str, sections: Sequence[Section], figures: Sequence[Plot]) -> str:
    """The whole document."""
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [_section(section) for section in sections]
    for number, (heading, plots) in enumerate(groupby(figures, key=lambda plot: plot.heading)):
        body = "\n".join(_figure(plot) for plot in plots)
        # The first ratio is open, the others a tap away.
        parts.append(
            f"<details{' open' if number < 2 else ''}><summary>{escape(heading)}</summary>\n{body}\n</details>"
        )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """A table that scrolls sideways on narrow screens."""
    kinds = [' class="word"' if name in WORDS else "" for name in columns]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in zip(kinds, columns, strict=True))
    lines = []
    for row in rows:
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        lines.append(f"<tr{_row_class(columns, row)}>{cells}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.heading)}</h2>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.text]
    if section.bullets:
        kind = "box fine" if section.fine else "box"
        items = "".join(f"<li>{escape(item)}</li>" for item in section.bullets)
        parts.append(f'<div class="{kind}"><ul>{items}</ul></div>')
    for name, columns, rows in section.tables:
        parts += [f"<p><strong>{escape(name)}</strong></p>"] if name else []
        parts.append(table(columns, rows))
    return "\n".join(parts)


def _figure(plot: Plot) -> str:
    drawing = svg(plot.figure).replace("<svg ", f'<svg role="img" aria-label="{escape(plot.tag)}" ', 1)
    return f'<figure><div class="scroll">{drawing}</div><figcaption>{escape(plot.caption)}</figcaption></figure>'


def _row_class(columns: Sequence[str], row: Row) -> str:
    if "verdict" not in columns:
        return ""
    verdict = row[list(columns).index("verdict")]
    if not verdict:
        return ' class="dense"'
    return ' class="unusable"' if verdict.startswith(UNUSABLE) else ""
