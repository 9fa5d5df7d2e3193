"""``report.html``: one file that opens offline, on a phone too, light or dark. It can load nothing from anywhere."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from itertools import groupby

from lightning_prune.comparison.assets import SCRIPT, STYLE
from lightning_prune.comparison.figures import Plot
from lightning_prune.comparison.sections import Section
from lightning_prune.comparison.style import svg
from lightning_prune.comparison.tables import Row
from lightning_prune.runs.verdict import UNUSABLE
from lightning_prune.support.escape import html as escape

WORDS = ("verdict", "error")  # columns of text
# Columns by the names they have in every format: what a page calls them, and which ones a phone leaves out at first.
HEADINGS = {
    "ratio": ("ratio", "pruning ratio asked for: the share of all parameters to remove"),
    "n": ("n", "runs, each with another seed of the calibration samples"),
    "verdict": ("verdict", "what the perplexity means; its limits stand under How to read the tables"),
    "achieved": ("ratio achieved", "the share of all parameters that was removed"),
    "parameters": ("parameters left", "parameters of the pruned model"),
    "calibrate s": ("calibrate, seconds", "the passes over the calibration set"),
    "prune s": ("prune, seconds", "deciding, solving, cutting and saving"),
    "evaluate s": ("evaluate, seconds", "the perplexity of this line's model"),
    "memory MiB": ("peak memory, MiB", "of the whole run, evaluation included"),
}
MINOR = ("achieved", "parameters", "calibrate s", "prune s", "evaluate s", "memory MiB")


def page(title: str, sections: Sequence[Section], figures: Sequence[Plot]) -> str:
    """The whole document: sections, the first figures, sections of detail, the other figures."""
    parts: list[tuple[str, str]] = [(one.heading, _section(one)) for one in sections if not one.detail]
    parts += _figures([plot for plot in figures if plot.first], folded=False)
    parts += [(one.heading, _section(one)) for one in sections if one.detail]
    parts += _figures([plot for plot in figures if not plot.first], folded=True)
    links = "".join(f'<li><a href="#part-{i}">{escape(heading)}</a></li>' for i, (heading, _) in enumerate(parts))
    body = "\n".join(f'<section id="part-{index}">\n{text}\n</section>' for index, (_, text) in enumerate(parts))
    # The only script that may run is the one below; nothing at all may be fetched.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<nav><details><summary>On this page</summary><ul>{links}</ul></details></nav>\n"
        f"{body}\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def table(name: str, columns: Sequence[str], rows: Sequence[Row], hints: Mapping[str, str]) -> str:
    """A table that sorts by its headings and scrolls sideways where it must; ``hints`` say more about a column."""
    kinds = [_kind(column) for column in columns]
    head = "".join(_head(column, kind, hints) for column, kind in zip(columns, kinds, strict=True))
    lines = []
    for row in rows:
        cells = "".join(f"<td{kind}>{_breakable(escape(cell))}</td>" for kind, cell in zip(kinds, row, strict=True))
        lines.append(f"<tr{_row_class(columns, row)}>{cells}</tr>")
    body = "\n".join(lines)
    more = '<label class="all"><input type="checkbox"> all columns</label>' if set(MINOR) & set(columns) else ""
    return (
        f'<div class="columns">{more}<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div></div>"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.heading)}</h2>"]
    texts = [f"<p>{escape(text)}</p>" for text in section.text]
    parts += [] if section.tables and not section.detail else texts
    if section.bullets:
        kind = "box fine" if section.fine else "box"
        items = "".join(f"<li>{escape(item)}</li>" for item in section.bullets)
        parts.append(f'<div class="{kind}"><ul>{items}</ul></div>')
    for name, columns, rows in section.tables:
        parts += [f"<p><strong>{escape(name)}</strong></p>"] if name else []
        parts.append(table(name or section.heading, columns, rows, section.hints))
    if section.tables and not section.detail:  # the numbers before the facts behind them
        parts += [text.replace("<p>", '<p class="fineprint">', 1) for text in texts]
    return "\n".join(parts)


def _figures(plots: Sequence[Plot], folded: bool) -> list[tuple[str, str]]:
    """(heading, figures) for every heading; folded ones but for the first open at a tap."""
    parts = []
    for number, (heading, members) in enumerate(groupby(plots, key=lambda plot: plot.heading)):
        drawn = [_figure(plot, f"{'more' if folded else 'first'}-{number}-{i}") for i, plot in enumerate(members)]
        body = '<div class="figures">\n' + "\n".join(drawn) + "\n</div>"
        if folded:
            summary = f"<summary>{escape(heading)}</summary>"
            body = f"<details{'' if number else ' open'}>{summary}\n{body}\n</details>"
        else:
            body = f"<h2>{escape(heading)}</h2>\n{body}"
        parts.append((heading, body))
    return parts


def _figure(plot: Plot, key: str) -> str:
    drawing = svg(plot.figure, key).replace("<svg ", f'<svg role="img" aria-label="{escape(plot.tag)}" ', 1)
    return f"<figure>{drawing}<figcaption>{escape(plot.caption)}</figcaption></figure>"


def _head(column: str, kind: str, hints: Mapping[str, str]) -> str:
    shown, more = HEADINGS.get(column, (column, ""))
    more = hints.get(column, more)
    said = f' title="{escape(more)}"' if more else ""
    button = f'<button type="button">{_breakable(escape(shown))}</button>'
    return f'<th scope="col" aria-sort="none"{kind}{said}>{button}</th>'


def _kind(column: str) -> str:
    found = [kind for kind, names in (("word", WORDS), ("minor", MINOR)) if column in names]
    return f' class="{" ".join(found)}"' if found else ""


def _breakable(escaped: str) -> str:
    """A name that may be broken behind its underscores."""
    return escaped.replace("_", "_<wbr>")


def _row_class(columns: Sequence[str], row: Row) -> str:
    if "verdict" not in columns:
        return ""
    verdict = row[list(columns).index("verdict")]
    if not verdict:
        return ' class="dense"'
    return ' class="unusable"' if verdict.startswith(UNUSABLE) else ""
