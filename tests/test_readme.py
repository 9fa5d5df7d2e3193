"""What the README tells a newcomer to type works and prints what it shows; files that first pages name are there."""

import doctest
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from lightning_prune.cli import main

ROOT = Path(__file__).parent.parent
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def blocks() -> list[tuple[str, str]]:
    """Language and text of every code block of the README."""
    return re.findall(
        r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def commands() -> list[tuple[str, str]]:
    """Those below which the README shows what they print; ``test_docs.py`` runs the others."""
    both = [pair for pair in pairwise(blocks()) if [language for language, _ in pair] == ["bash", "text"]]
    return [(typed.split("&&")[-1].strip(), printed) for (_, typed), (_, printed) in both]


def same(shown: str, printed: str) -> bool:
    """Numbers may differ by a hundredth, as on another processor they do."""
    values = [[float(number.replace(",", "")) for number in NUMBER.findall(line)] for line in (shown, printed)]
    return NUMBER.sub("0", shown) == NUMBER.sub("0", printed) and values[0] == pytest.approx(values[1], rel=0.01)


def is_printed(shown: str, printed: str) -> bool:
    """Every line in its order, and others between them only where the README has a line "…"."""
    rest, gap = printed.strip().splitlines(), False
    for line in shown.splitlines():
        if line == "…":
            gap = True
            continue
        place = next((index for index, other in enumerate(rest) if same(line, other)), None)
        if place is None or (place and not gap):
            return False
        rest, gap = rest[place + 1 :], False
    return gap or not rest


@pytest.mark.parametrize(
    ("shown", "right"),
    [
        ("a 1.000\nb 2\nc", True),
        ("a 1.004\nb 2\nc", True),
        ("a 1.1\nb 2\nc", False),
        ("a 1\nc", False),
        ("a 1\n…\nc", True),
        ("…\nc\n…", True),
        ("…\nd", False),
        ("a 1\nb 2", False),
    ],
)
def test_output_is_compared_line_by_line(shown: str, right: bool) -> None:
    assert is_printed(shown, "\na 1\nb 2\nc\n") is right


@pytest.mark.slow
def test_commands_of_the_readme_print_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(commands()) == 2
    for command, shown in commands():
        program, *words = shlex.split(command)
        assert program == "lightning-prune"
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert is_printed(shown, printed), printed


@pytest.mark.slow
def test_python_of_the_readme_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sessions = [text for language, text in blocks() if language == "pycon"]
    assert sessions
    for text in sessions:
        example = doctest.DocTestParser().get_doctest(text, {}, "README", "README.md", 0)
        failed, tried = doctest.DocTestRunner().run(example)
        assert tried
        assert not failed


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_and_named_files_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"\]\((?!http)([^)#]+)", text)
    named += re.findall(r"configs/[\w.]+|docs/[\w.]+|CONTRIBUTING\.md|CHANGELOG\.md", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
