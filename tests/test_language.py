"""Pages are in plain English: no word that means something else to a reader, and short sentences on first pages."""

import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIRST = [ROOT / "README.md", ROOT / "docs" / "index.md"]
README_WORDS, DOCS_WORDS = 900, 12_000  # tables, code and output included, notes not
LONGEST = 35  # words of a sentence
SAID = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
REPLACED = {  # used for → what to write
    r"behind": "after",
    r"stands?|stood": "is",
    r"leaves|goes": "is removed",
    r"what stays": "what is kept",
    r"puts? out": "outputs",
    r"(makes?|made|making) up for": "compensates for",
    r"held against": "compared with",
    r"(?<!there )(is|are) no(?! longer)": "is not a",
    r"asked for": "requested",
    r"had from|comes? by|belongs? into": "say it plainly",
    r"mend(s|ed|ing)?": "repair",
    r"walk(s|ed|ing)?": "calibration, or pass",
    r"findings?": "result",
    r"waypoints?": "stream checkpoint",
    r"anatomy": "structure",
    r"surgery": "checkpoint",
    r"overlays?": "in-memory plan",
    r"proofs?": "check",
}


def prose(page: Path) -> str:
    """A page without code, and with the text of links in place of links."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", text))


def sentences(text: str) -> Iterator[str]:
    """Of paragraphs, list items, headings and cells of tables."""
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*#|>]|\d+\.) ?)|(?<= )\|", text):
        yield from re.split(r"(?<=[.!?])\s+", " ".join(block.split()))


def words(text: str) -> list[str]:
    return [word for word in text.split() if re.search(r"\w", word)]


def said(file: Path) -> str:
    """What comments and strings of a Python file say, or the comments of a YAML file, or a notebook's text."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        return "\n".join("".join(cell["source"]) for cell in cells)
    if file.suffix == ".yaml":
        return "\n".join(re.findall(r"# (.*)", text))
    parts = tokenize.generate_tokens(io.StringIO(text).readline)
    return re.sub(r"`[^`]*`", "code", "\n".join(part.string for part in parts if part.type in SAID))


def unusual(name: str, text: str) -> list[str]:
    """The words of a text that have a usual one, each with what is around it."""
    text = " ".join(text.split())
    return [
        f"{name}: '{match[0]}' for '{instead}': …{text[max(match.start() - 40, 0) : match.end() + 20]}…"
        for pattern, instead in REPLACED.items()
        for match in re.finditer(rf"\b({pattern})\b", text, re.IGNORECASE)
    ]


def test_pages_use_the_usual_words() -> None:
    assert [word for page in PAGES for word in unusual(page.name, prose(page))] == []


def test_the_package_its_configurations_and_the_notebook_use_the_usual_words() -> None:
    files = [file for folder in ("lightning_prune", "configs", "docs") for file in (ROOT / folder).rglob("*")]
    files = [file for file in files if file.suffix in (".py", ".yaml", ".ipynb")]
    assert [word for file in files for word in unusual(str(file.relative_to(ROOT)), said(file))] == []


def test_first_pages_are_short_and_so_are_their_sentences() -> None:
    assert [one for page in FIRST for one in sentences(prose(page)) if len(words(one)) > LONGEST] == []
    assert len(FIRST[0].read_text(encoding="utf-8").split()) <= README_WORDS
    pages = [page for page in PAGES if "docs" in page.parts and "notes" not in page.parts]
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in pages) <= DOCS_WORDS


def test_the_rules_see_what_they_should() -> None:
    assert [len(words(one)) for one in sentences("A b. C d e?\n- f | g h\n\n| i | j k |")] == [2, 3, 1, 2, 1, 2, 0]
