"""Pages are in plain English: no word that means something else to a reader, and short sentences on first pages."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIRST = [ROOT / "README.md", ROOT / "docs" / "index.md"]
README_WORDS = 900  # tables, code and output included
LONGEST = 35  # words of a sentence
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


def test_pages_use_the_usual_words() -> None:
    used = [
        f"{page.name}: '{match[0]}' for '{instead}': …{text[max(match.start() - 40, 0) : match.end() + 20]}…"
        for page in PAGES
        for text in [" ".join(prose(page).split())]
        for pattern, instead in REPLACED.items()
        for match in re.finditer(rf"\b({pattern})\b", text, re.IGNORECASE)
    ]
    assert used == []


def test_first_pages_are_short_and_so_are_their_sentences() -> None:
    assert [one for page in FIRST for one in sentences(prose(page)) if len(words(one)) > LONGEST] == []
    assert len(FIRST[0].read_text(encoding="utf-8").split()) <= README_WORDS


def test_the_rules_see_what_they_should() -> None:
    assert [len(words(one)) for one in sentences("A b. C d e?\n- f | g h\n\n| i | j k |")] == [2, 3, 1, 2, 1, 2, 0]
