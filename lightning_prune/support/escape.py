"""Names and messages that come from outside, made harmless for the format they are shown in: a newline ends a table
row, an escape sequence clears the terminal. HTML pages are escaped by their templates."""

import os
import re
import unicodedata
from collections.abc import Sequence

_SHAPERS = "\u200c\u200d"  # invisible, but part of how Persian, Indic scripts and emoji are written
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, direction marks, lone surrogates, line and paragraph separators
_LATEX: dict[str, str | int | None] = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
_LATEX |= {character: "\\" + character for character in "&%$#_{}"}
_LATEX |= {character: "{" + character + "}" for character in "[]*"}  # a row's first [ or * would belong to the last \\
_MARKDOWN: dict[str, str | int | None] = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKDOWN |= {character: "\\" + character for character in "\\`*[]|$~"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_CACHED = re.compile(r"(?:^|[/\\])models--([\w.-]+)[/\\]snapshots[/\\][\w.-]+[/\\]?$", re.ASCII)
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_FILE = re.compile(r"\.(txt|jsonl?|gz|parquet|npy|safetensors)$", re.IGNORECASE)


def plain(text: object) -> str:
    r"""One line of visible text, for terminals, CSV and as the first step of every other format: white space becomes
    single spaces, control characters, direction marks and lone surrogates become ``\x1b``."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _HIDDEN and character not in _SHAPERS
        else character
        for character in " ".join(str(text).split())
    )


def markdown(text: object) -> str:
    """Inline text of a Markdown paragraph, list item or table cell: no markup, HTML, formula, link or new block."""
    line = plain(text).translate(str.maketrans(_MARKDOWN))
    # Between letters and digits an underscore is not emphasis, so hgsp_taylor stays readable in the source.
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)
    line = re.sub(r"(?i)(?<=\w)://|(?<=www)\.", lambda match: "\\" + match.group(), line)  # addresses become links
    # What starts a heading, list or rule only at the beginning of a line.
    return re.sub(r"^(\d*)(?=[.)](\s|$)|[-+#=]+(\s|$))", r"\1\\", line)


def markdown_code(text: object) -> str:
    """A code span where the text is a simple name, escaped text otherwise."""
    line = plain(text)
    return f"`{line}`" if re.fullmatch(r"[\w./@+-]+", line) else markdown(line)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table of cells that are Markdown already."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def latex(text: object) -> str:
    """Text of a LaTeX document, tables included."""
    line = plain(text).translate(str.maketrans(_LATEX))
    return re.sub(r"-(?=-)", "-{}", line)  # two hyphens would print as a dash


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form ``organisation/name`` and is not a path of this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not _is_path(name)


def hub_id_of(name: str) -> str | None:
    """The hub id that ``name`` is or, as a folder of the hub's cache, is a copy of; None for others."""
    if is_hub_id(name):
        return name
    for path in (name, os.path.abspath(os.path.expanduser(name))):
        if _is_path(path) and (cached := _CACHED.search(path)):
            return cached[1].replace("--", "/", 1)
    return None


def public_name(name: str) -> str:
    """The hub id of a folder of the hub's cache; of other paths the last part, so that the folders of this machine stay
    private; anything else as it is."""
    if not _is_path(name):
        return name
    if cached := hub_id_of(name):
        return cached
    parts = [part for part in re.split(r"[/\\]" if _WINDOWS.match(name) else "/", name) if part]
    if not parts or parts[-1] in (".", "..", "~"):
        return os.path.basename(os.path.abspath(os.path.expanduser(name))) or name
    return parts[-1]


def _is_path(name: str) -> bool:
    known = name.startswith(("/", "~", "./", "../", "file:")) or _WINDOWS.match(name) or _FILE.search(name)
    return bool(known) or os.path.exists(name)
