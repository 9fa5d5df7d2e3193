import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.comparison.html import table

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "link", "input", "wbr", "br", "use", "path", "image"}


class Page(HTMLParser):
    """Every element with its attributes, its ancestors, and the text in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.text: dict[int, str] = {}
        self._open: list[tuple[str, int]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, [name for name, _ in self._open]))
        if tag not in VOID:
            self._open.append((tag, len(self.elements) - 1))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for _, index in self._open:
            self.text[index] = self.text.get(index, "") + data

    def all(self, tag: str) -> list[tuple[int, dict[str, str], list[str]]]:
        return [(i, attributes, above) for i, (name, attributes, above) in enumerate(self.elements) if name == tag]

    def texts(self, tag: str) -> list[str]:
        return [self.text.get(index, "").strip() for index, _, _ in self.all(tag)]


@pytest.fixture(scope="module")
def source(report: Path) -> str:
    return (report / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_page_refers_to_nothing_outside_itself(source: str, page: Page) -> None:
    assert "http://" not in source
    assert "https://" not in source
    assert "@import" not in source
    assert not re.search(r"url\((?!#)", source)
    links = [
        value
        for _, attributes, _ in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "data", "srcset", "action")
    ]
    assert all(value.startswith(("#", "data:")) for value in links), links
    tags = [tag for tag, _, _ in page.elements]
    assert not {"iframe", "img", "object", "form"} & set(tags)
    assert "b" not in tags  # a label of the runs is "wanda <b>&"
    assert "wanda <b>&" in page.text[0]


def test_policy_lets_the_pages_own_script_run_and_nothing_be_fetched(page: Page) -> None:
    (script,) = page.texts("script")
    (index, _, _), *more = page.all("script")
    assert not more
    digest = base64.b64encode(hashlib.sha256(page.text[index].encode()).digest()).decode()
    policy = next(attributes["content"] for _, attributes, _ in page.all("meta") if "http-equiv" in attributes)
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
    ]
    assert "aria-sort" in script


def test_every_name_in_the_page_is_there_once_and_every_reference_meets_one(source: str, page: Page) -> None:
    names = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    used = re.findall(r'href="#([^"]+)"', source) + re.findall(r"url\(#([^)]+)\)", source)
    assert used
    assert set(used) <= set(names)


def test_every_column_sorts_and_is_reached_with_the_keyboard(page: Page) -> None:
    heads = page.all("th")
    assert len(page.all("table")) >= 3
    assert len([above for _, _, above in page.all("button") if "th" in above]) == len(heads) > 20
    assert {(attributes["scope"], attributes["aria-sort"]) for _, attributes, _ in heads} == {("col", "none")}
    assert all(page.texts("th"))


def test_what_was_asked_and_what_came_of_it_stand_first(page: Page) -> None:
    # The failed run's table, then the results.
    assert page.texts("th")[:5] == ["system", "ratio", "error", "system", "ratio"]
    assert page.texts("th")[5:7] == ["perplexity demo", "verdict"]
    minor = {page.text[i] for i, attributes, _ in page.all("th") if "minor" in attributes.get("class", "")}
    assert minor == {"ratio achieved", "parameters left", "calibrate, seconds", "prune, seconds", "evaluate, seconds",
                     "peak memory, MiB"}  # fmt: skip


def test_headings_are_words(page: Page) -> None:
    assert page.texts("h1") == ["Pruning methods compared"]
    headings = page.texts("h2") + page.texts("summary")
    assert "Table 1: demo, calibrated on 128 × 128 tokens" in headings
    assert "At a ratio of 20 %" in headings
    assert all(heading and len(heading) < 70 and "/" not in heading for heading in headings)


def test_every_mark_of_a_plot_says_its_value(source: str, page: Page) -> None:
    drawings = re.findall(r"<svg .*?</svg>", source, flags=re.DOTALL)
    assert len(drawings) == len(page.all("svg")) >= 15
    for drawing in drawings:
        assert re.match(r'<svg role="img" aria-label="[^"]+"', drawing)
        assert drawing.count('class="mark"') == drawing.count('class="mark"><title>') > 0
    said = [text for index, _, above in page.all("title") if "svg" in above and (text := page.text[index])]
    assert "hgsp_taylor, ratio 0.5: perplexity 31.000, 50.00% removed, badly degraded" in said
    assert "shortgpt, ratio 0.5: perplexity not finite, 50.00% removed, unusable" in said
    assert "hgsp_taylor and hgsp_taylor: 1.0000" in said
    assert any(re.fullmatch(r"wanda <b>&, layer \d, mlp: \d+\.\d% kept", text) for text in said)


def test_drawings_take_their_ink_from_the_page(source: str) -> None:
    drawings = "".join(re.findall(r"<svg .*?</svg>", source, flags=re.DOTALL))
    assert "var(--ink)" in drawings
    assert "#000000" not in drawings
    assert not re.search(r"<path [^>]*fill: #ffffff", drawings)  # no white sheet behind a plot
    assert "<style" not in drawings


def test_hint_and_class_belong_to_the_column() -> None:
    found = table("t", ["system", "perplexity a", "verdict"], [("x_y", "1", "")], {"perplexity a": "perplexity on /a"})
    assert 'title="perplexity on /a"><button type="button">perplexity a</button>' in found
    assert '<tr class="dense"><td>x_<wbr>y</td>' in found


# The page reports on itself: what it logs and loads, its width against the window's, and what sorting does.
PROBE = """
const errors = [];
addEventListener("error", event => errors.push(event.message), true);
addEventListener("securitypolicyviolation", event => errors.push(event.violatedDirective));
addEventListener("load", () => {
  for (const one of document.querySelectorAll("details")) one.open = true;
  const over = document.documentElement.scrollWidth - innerWidth;
  const cut = [...document.querySelectorAll("svg, h2, p")].filter(e => e.getBoundingClientRect().right > innerWidth);
  const table = [...document.querySelectorAll("table")].find(one => one.querySelector("tr.dense"));
  const heads = [...table.querySelectorAll("th")];
  const column = heads.findIndex(head => head.textContent.startsWith("perplexity"));
  const cells = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
  const sides = heads.slice(0, column + 1).map(head => head.getBoundingClientRect().right);
  heads[column].firstElementChild.focus();
  const focus = document.activeElement === heads[column].firstElementChild;
  heads[column].firstElementChild.click();
  const up = [heads[column].ariaSort, ...cells()];
  heads[column].firstElementChild.click();
  const down = [heads[column].ariaSort, ...cells()];
  parent.postMessage(JSON.stringify({ errors, over, focus, up, down, cut: cut.length, width: innerWidth,
    seen: Math.max(...sides), loads: performance.getEntriesByType("resource").map(entry => entry.name),
    drawn: [...document.querySelectorAll("svg")].every(one => one.getBoundingClientRect().height > 50),
    page: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector("svg text")).fill }), "*");
});
"""


def probe(source: str, folder: Path, width: int, dark: bool) -> dict[str, Any]:
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    text = source.replace("script-src ", f"script-src 'sha256-{digest}' ")
    (folder / "page.html").write_text(text.replace("</head>", f"<script>{PROBE}</script></head>"), encoding="utf-8")
    # In a frame, because a window has a width of at least 500 pixels.
    frame = folder / "frame.html"
    frame.write_text(
        f'<iframe src="page.html" width="{width}" height="2000" style="border:0"></iframe>'
        '<script>addEventListener("message", event => { document.title = "PROBE " + event.data; });</script>'
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"]
    options += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,2000", "--dump-dom"]
    options += ["--virtual-time-budget=5000", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    assert BROWSER is not None
    done = subprocess.run([BROWSER, *options, frame.as_uri()], capture_output=True, text=True, timeout=60, check=False)
    assert "CONSOLE" not in done.stderr
    found = re.search(r"<title>PROBE (.*?)</title>", done.stdout)
    assert found is not None, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(unescape(found.group(1)))
    return result


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path (chromium, google-chrome): page not rendered")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False), (1280, True)])
def test_browser_shows_the_whole_page_light_and_dark_and_sorts_it(
    source: str, tmp_path: Path, width: int, dark: bool
) -> None:
    found = probe(source, tmp_path, width, dark)
    assert (found["errors"], found["loads"], found["width"]) == ([], [], width)
    assert found["over"] <= 0
    assert found["cut"] == 0
    assert found["drawn"]
    assert found["seen"] <= width  # the perplexity of the first table
    assert found["focus"]
    assert found["up"] == ["ascending", "10.000", "11.250", "12.500", "12.500", "31.000", "100.000", "not finite"]
    assert found["down"] == ["descending", "10.000", "not finite", "100.000", "31.000", "12.500", "12.500", "11.250"]
    brightness = {name: sum(map(int, re.findall(r"\d+", found[name])[:3])) for name in ("page", "ink")}
    assert brightness["page"] < 150 < 600 < brightness["ink"] if dark else brightness["ink"] < 150 < brightness["page"]
