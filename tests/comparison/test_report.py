import csv
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_prune.comparison.audit import Audit, audit
from lightning_prune.comparison.report import write_report
from lightning_prune.comparison.run import load_run
from lightning_prune.comparison.sections import sections, terminal
from lightning_prune.runs.failure import Failure
from tests.comparison.fake_run import write_run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


SECOND = {"fingerprint": "7" * 64, "seq_len": 512}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    tmp_path = tmp_path_factory.mktemp("runs")
    folders = [
        write_run(tmp_path, "magnitude", 0.2, no_data=True, seed=1),
        write_run(tmp_path, "magnitude", 0.5, no_data=True, seed=1, perplexity=100.0, version=1),
        write_run(tmp_path, "hgsp_taylor", 0.2, seed=2, perplexity=11.25),
        write_run(tmp_path, "hgsp_taylor", 0.5, seed=2, perplexity=31.0, version=1),  # below √(dense × unigram)
        write_run(tmp_path, "wanda <b>&", 0.2, seed=4),
        write_run(tmp_path, "shortgpt", 0.2, 0.25, whole_layers=True, seed=3),
        write_run(tmp_path, "shortgpt", 0.5, perplexity=None, whole_layers=True, seed=3, version=1),
        write_run(tmp_path, "shortgpt_512", 0.2, 0.25, whole_layers=True, calibration=SECOND),
    ]
    return audit([load_run(folder) for folder in folders])


@pytest.fixture(scope="module")
def report(result: Audit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "report"
    write_report(result, [Failure("slimgpt", 0.3, "RuntimeError: broken")], folder)
    return folder


class Resources(HTMLParser):
    """Everything a browser would fetch, and every piece of text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html_refers_to_nothing_outside_itself(report: Path) -> None:
    html = (report / "report.html").read_text(encoding="utf-8")
    assert "http://" not in html
    assert "https://" not in html
    page = Resources()
    page.feed(html)
    assert all(value.startswith(("#", "data:")) for value in page.found), page.found
    assert not {"script", "iframe", "img", "object"} & set(page.tags)
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert page.tags.count("svg") >= 5
    assert "wanda <b>&" in "".join(page.text)
    assert "b" not in page.tags


def test_html_names_every_url_fragment_it_uses(report: Path) -> None:
    html = (report / "report.html").read_text(encoding="utf-8")
    used = set(re.findall(r'xlink:href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html))
    assert used <= set(re.findall(r'\sid="([^"]+)"', html))


def test_model_no_better_than_chance_is_called_unusable_everywhere(result: Audit, report: Path) -> None:
    with (report / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "finished"]
    verdicts = {(row["system"], row["requested_ratio"]): row["verdict"] for row in rows}
    assert verdicts["magnitude", "0.5"] == "unusable"  # equal to the unigram model's
    assert verdicts["shortgpt", "0.5"] == "unusable"  # not finite
    assert verdicts["hgsp_taylor", "0.5"] == "badly degraded"
    assert verdicts["hgsp_taylor", "0.2"] == "degraded"
    text = terminal(sections(result, []))
    for line in ("magnitude at 0.5 on demo", "shortgpt at 0.5 on demo"):
        assert line in text
        assert line in (report / "report.md").read_text(encoding="utf-8")
        assert line in (report / "report.html").read_text(encoding="utf-8")
    assert "unusable, 100.000" in (report / "results.tex").read_text(encoding="utf-8")


def test_csv_has_one_line_per_run_and_keeps_every_digit(report: Path) -> None:
    with (report / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 + 1
    taylor = next(row for row in rows if row["system"] == "hgsp_taylor")
    assert (taylor["table"], taylor["perplexity"], taylor["unigram_perplexity"]) == ("1", "11.25", "100.0")
    assert {row["table"] for row in rows if row["system"] == "shortgpt_512"} == {"2"}
    assert [row["ratio_reached"] for row in rows if row["system"] == "shortgpt"] == ["0", "1"]
    assert rows[-1]["status"] == "failed"
    assert rows[-1]["message"] == "RuntimeError: broken"


def test_latex_is_booktabs_with_one_table_per_setting(report: Path) -> None:
    text = (report / "results.tex").read_text(encoding="utf-8")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 2
    assert r"hgsp\_taylor & 11.250 & 31.000 \\" in text
    assert r"wanda \textless{}b\textgreater{}\& & 12.500 & -- \\" in text
    assert r"shortgpt & 12.500 (25.0\,\%) & -- \\" in text
    for line in text.splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert line.replace(r"\&", "").count("&") in (1, 2)


def test_appendix_states_what_a_methods_section_needs(report: Path) -> None:
    text = (report / "calibration_appendix.md").read_text(encoding="utf-8")
    for fact in ("128 sequences of 128 tokens", "seed 0", "c" * 64, "a" * 64, "| Revision | r1 |", "| tau | 0.125 |"):
        assert fact in text
    assert "magnitude reads weights only and used no calibration data." in text
    assert "## Calibration set 2: shortgpt_512" in text
    assert "| torch | 2.13.0 |" in text


def test_events_hold_the_agreement_matrices_as_images(report: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(report))
    events.Reload()
    assert {"0.2/agreement of units", "0.2/agreement of layers", "perplexity/demo"} <= set(events.Tags()["images"])
    assert events.Images("0.2/agreement of units")[0].encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_browser_renders_the_report_without_errors_or_sideways_scrolling(
    report: Path, tmp_path: Path, width: int
) -> None:
    page = tmp_path / "page.html"
    # The page reports on itself: errors, loads from outside, and its width against the window's.
    probe = (
        "<script>const errors=[];addEventListener('error',e=>errors.push(e.message),true);addEventListener('load',()=>{"
        "document.title='PROBE '+JSON.stringify({errors,loads:performance.getEntriesByType('resource').map(e=>e.name),"
        "over:document.documentElement.scrollWidth-innerWidth,drawn:[...document.querySelectorAll('details[open] svg')]"
        ".every(s=>s.getBoundingClientRect().height>50)})});</script></head>"
    )
    page.write_text((report / "report.html").read_text(encoding="utf-8").replace("</head>", probe), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", "--dump-dom"]
    assert BROWSER is not None
    done = subprocess.run([BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=60, check=False)
    assert "CONSOLE" not in done.stderr
    found = re.search(r"<title>PROBE (.*?)</title>", done.stdout)
    assert found is not None, done.stderr[-2000:]
    assert '"errors":[],"loads":[],"over":' in found.group(1)
    assert int(re.search(r'"over":(-?\d+)', found.group(1)).group(1)) <= 0, found.group(1)  # type: ignore[union-attr]
    assert '"drawn":true' in found.group(1)
