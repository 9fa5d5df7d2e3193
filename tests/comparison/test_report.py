import base64
import csv
import hashlib
import re
from pathlib import Path

import pytest

from lightning_prune.comparison.audit import Audit
from lightning_prune.comparison.sections import sections, terminal


@pytest.fixture(scope="module")
def page(report: Path) -> str:
    return (report / "report.html").read_text(encoding="utf-8")


def test_model_no_better_than_chance_is_called_unusable_everywhere(result: Audit, report: Path, page: str) -> None:
    with (report / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "finished"]
    verdicts = {(row["system"], row["requested_ratio"]): row["verdict"] for row in rows}
    assert verdicts["magnitude", "0.5"] == "unusable"  # equal to the unigram model's
    assert verdicts["shortgpt", "0.5"] == "unusable"  # not finite
    assert verdicts["hgsp_taylor", "0.5"] == "badly degraded"
    assert verdicts["hgsp_taylor", "0.2"] == "degraded"
    line = r"magnitude\W+0\.5\W+100\.000\W+unusable"
    assert re.search(line, terminal(sections(result, [])))
    assert re.search(line, (report / "report.md").read_text(encoding="utf-8"))
    assert re.search(line, re.sub(r"<[^>]*>", " ", page))
    assert page.count('<tr class="unusable">') == 2
    assert "unusable, 100.000" in (report / "results.tex").read_text(encoding="utf-8")


def test_csv_has_one_line_per_run_and_keeps_every_digit(report: Path) -> None:
    with (report / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 + 1
    taylor = next(row for row in rows if row["system"] == "hgsp_taylor")
    assert (taylor["table"], taylor["perplexity"], taylor["unigram_perplexity"]) == ("1", "11.25", "100.0")
    assert (taylor["n"], taylor["parameters_dense"], taylor["perplexity_sd"]) == ("1", "1000", "")
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
    assert r"shortgpt & 12.500 (25.0 \%) & unusable \\" in text
    for line in text.splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert line.replace(r"\&", "").count("&") in (1, 2)


def test_appendix_states_what_a_methods_section_needs(report: Path) -> None:
    text = (report / "calibration_appendix.md").read_text(encoding="utf-8")
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in text.splitlines() if line.startswith("|")}
    expected = {
        "num_samples": "128",
        "seq_len": "128",
        "seed": "0",
        "fingerprint": "c" * 64,
        "text_sha256": "a" * 64,
        "revision": "r1",
        "tau": "0.125",
        "packages.torch": "2.13.0",
    }
    assert rows >= set(expected.items())
    assert "magnitude reads weights only and used no calibration data." in text
    assert "## Calibration set 2: shortgpt_512" in text


def test_page_refers_to_nothing_outside_itself_and_only_its_own_script_may_run(page: str) -> None:
    assert "http://" not in page
    assert "https://" not in page
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_page_begins_with_the_answer_and_has_every_plot(page: str) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[:3] == ["Best per ratio", "Failed runs", "Table 1: demo, calibrated on 128 × 128 tokens"]
    assert "<td>wanda &lt;b&gt;&amp;</td>" in page
    assert "At a ratio of 20 % (Table 1)" in page
    assert page.count("<img ") == page.count("data:image/svg+xml;base64,") >= 10
