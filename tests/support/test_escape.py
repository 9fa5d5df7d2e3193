import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_prune.support import escape

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "![image](http://example.com/a.png) [link](http://example.com) [a][b] www.example.com <https://example.com>",
    "a|b\\|c\\ &lt; &amp;",
    "`code` ``x`` *em* **strong** _em_ __strong__ a_b_c ~~gone~~ $x^2$ $$y$$ 100 $ and 5 $",
    "two\nlines\r\nand\u2028three\x0bfour",
    "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\udc80\ufeff",
    *("# heading", "1. item", "2) item", "- item", "+", "---", "===", "> quote", "    code", "***"),
    "% & # { } ~ ^ \\ -- [x] * \\input{/etc/passwd} \\\\ [1cm] \\$",
]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(markdown: str) -> Page:
    """As a renderer shows it that lets raw HTML through."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True})
    page = Page()
    page.feed(parser.enable(["table", "strikethrough"]).render(markdown))
    return page


def test_what_people_write_stays_readable() -> None:
    for text in ("hgsp_taylor", "naïve 模型 модель", "a\u200db", "50 % – 3 × 4"):
        assert escape.plain(text) == text
    for name in ("hgsp_taylor", "2.13.0", "-0.5", "llama-3.1-8b", "a/b"):
        assert escape.markdown(name) == name
    assert escape.markdown_code("a/b_c") == "`a/b_c`"


TABLE = ["table", "thead", "tr", "th", "tbody", "tr", "td"]


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_the_text_and_nothing_else(text: str) -> None:
    shown = escape.markdown(text)
    for markdown, tags in (
        (shown, ["p"]),
        (f"- {shown}", ["ul", "li"]),
        (f"## {shown}", ["h2"]),
        (f"**{shown}**", ["p", "strong"]),
        (escape.markdown_table(("",), [(shown,)]), TABLE),
        (escape.markdown_table(("",), [(escape.markdown_code(text),)]), TABLE),
    ):
        page = rendered(markdown)
        assert [tag for tag in page.tags if tag != "code"] == tags, markdown
        assert page.text.strip() == escape.plain(text)
    source = re.sub(r"\\[!-/:-@\[-`{-~]", "", shown)  # without what a backslash covers
    assert not re.search(r"[$<>`|\[\]*~]|://|www\.", source)


COMMAND = re.compile(r"\\(text\w+)\{\}|\\([&%$#_{}])|\{([\[\]*])\}|(-)\{\}")
PRINTED = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^"}
PRINTED |= {"textless": "<", "textgreater": ">", "textbar": "|"}


def read_latex(source: str) -> str:
    """What LaTeX prints, for the few commands that the escaping uses; anything else active fails."""
    assert not re.search(r"[\\&%$#_{}~^<>|\[\]*\n]|--", COMMAND.sub(" ", source))
    return COMMAND.sub(lambda match: PRINTED.get(match[1]) or match[2] or match[3] or match[4], source)


@pytest.mark.parametrize("text", HOSTILE)
def test_plain_text_is_one_visible_line_and_latex_prints_it(text: str) -> None:
    line = escape.plain(text)
    assert line.splitlines() == [line.strip()]
    assert not {unicodedata.category(character) for character in line} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    line.encode("utf-8")
    assert read_latex(escape.latex(text)) == line


PUBLIC = {
    "/home/me/models/llama": "llama",
    "/home/me/models/llama/": "llama",
    "../data/validation.txt": "validation.txt",
    "data/train.jsonl": "train.jsonl",
    "~/corpus.npy": "corpus.npy",
    "C:\\Users\\me\\text.txt": "text.txt",
    **{name: name for name in ("meta-llama/Llama-3.1-8B", "models/llama", "wikitext2", "")},  # as on the hub
}


def test_folders_of_this_machine_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {name: escape.public_name(name) for name in PUBLIC} == PUBLIC
    assert escape.is_hub_id("models/llama")
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert not escape.is_hub_id("models/llama")
    assert escape.public_name("models/llama") == "llama"
    assert escape.public_name(".") == tmp_path.name
