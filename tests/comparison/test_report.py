import base64
import csv
import hashlib
import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from lightning_prune.comparison.audit import Audit, audit
from lightning_prune.comparison.report import write_report
from lightning_prune.comparison.sections import sections, terminal
from lightning_prune.runs.records import ContinuationFacts
from tests.comparison.fake_run import make_run


@pytest.fixture(scope="module")
def page(report: Path) -> str:
    return (report / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows(report: Path) -> list[dict[str, str]]:
    with (report / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_model_no_better_than_chance_is_called_unusable_everywhere(
    result: Audit, report: Path, page: str, rows: list[dict[str, str]]
) -> None:
    verdicts = {(row["system"], row["requested_ratio"]): row["verdict"] for row in rows}
    assert verdicts["magnitude", "0.5"] == "unusable"  # equal to the unigram model's
    assert verdicts["shortgpt", "0.5"] == "unusable"  # not finite
    assert verdicts["hgsp_taylor", "0.5"] == "badly degraded"
    assert verdicts["hgsp_taylor", "0.2"] == "degraded"
    markdown = (report / "report.md").read_text(encoding="utf-8")
    for text in (terminal(sections(result, [])), markdown, re.sub(r"<[^>]*>", " ", page)):
        assert re.search(r"magnitude\W+0\.5\W+100\.000\W+unusable", text)
    assert page.count('<tr class="unusable">') == 2
    assert "unusable, 100.000" in (report / "results.tex").read_text(encoding="utf-8")


def test_csv_has_one_line_per_run_and_keeps_every_digit(rows: list[dict[str, str]]) -> None:
    assert len(rows) == 8 + 1
    taylor = next(row for row in rows if row["system"] == "hgsp_taylor")
    expected = {"table": "1", "perplexity": "11.25", "unigram_perplexity": "100.0", "n": "1", "perplexity_sd": ""}
    assert taylor.items() >= (expected | {"parameters_dense": "1000"}).items()
    assert {row["table"] for row in rows if row["system"] == "shortgpt_512"} == {"2"}
    assert [row["ratio_reached"] for row in rows if row["system"] == "shortgpt"] == ["0", "1"]
    assert (rows[-1]["status"], rows[-1]["message"]) == ("failed", "RuntimeError: broken")


def test_latex_is_booktabs_with_one_table_per_setting(report: Path) -> None:
    text = (report / "results.tex").read_text(encoding="utf-8")
    for command in (r"\begin{tabular}", r"\end{tabular}", r"\toprule", r"\bottomrule"):
        assert text.count(command) == 2
    assert r"hgsp\_taylor & 11.250 & 31.000 \\" in text
    assert r"wanda \textless{}b\textgreater{}\& & 12.500 & -- \\" in text
    assert r"shortgpt & 12.500 (25.0 \%) & unusable \\" in text
    for line in text.splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert line.replace(r"\&", "").count("&") in (1, 2)


def test_appendix_states_what_a_methods_section_needs(report: Path) -> None:
    text = (report / "calibration_appendix.md").read_text(encoding="utf-8")
    stated = {
        tuple(cell.strip() for cell in line.split("|")[1:3]) for line in text.splitlines() if line.startswith("|")
    }
    assert stated >= {("num_samples", "128"), ("seq_len", "128"), ("seed", "0"), ("fingerprint", "c" * 64)}
    assert stated >= {("text_sha256", "a" * 64), ("revision", "r1"), ("tau", "0.125"), ("packages.torch", "2.13.0")}
    assert "magnitude reads weights only and used no calibration data." in text
    assert "## Calibration set 2: shortgpt_512" in text


def test_page_loads_nothing_and_only_its_own_scripts_may_run(page: str) -> None:
    data = re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    own = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search("https?://", own)
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]*)"', own))
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {allowed}"
    assert len(scripts) == 2
    assert f'content="{policy}"' in page
    assert page.count('<div id="chart-') == len(data) >= 10
    targets = [json.loads(item)["target_id"] for item in data]
    assert targets == re.findall(r'<div id="(chart-\d+)">', page)
    assert len(page.encode()) < 5e6


def test_page_begins_with_the_picture_and_the_answer_and_ends_with_the_appendix(report: Path, page: str) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert "<title>Pruning methods compared: demo</title>" in page
    assert headings[:3] == ["Best per ratio", "Failed runs", "Table 1: demo, calibrated on 128 × 128 tokens, seed 0"]
    assert page.index('<div id="chart-0">') < page.index("Best per ratio") < page.index('<div id="chart-1">')
    assert "<td>wanda &lt;b&gt;&amp;</td>" in page
    assert "Kept by layer at 20 % (Table 1)" in page
    appendix = re.findall(r'<pre id="appendix">(.*?)</pre>', page, flags=re.DOTALL)[0]
    assert html.unescape(appendix).splitlines() == (report / "calibration_appendix.md").read_text().splitlines()


def test_tensorboard_has_a_run_per_system_and_curves_that_are_not_smoothed(report: Path, result: Audit) -> None:
    def read(folder: Path) -> EventAccumulator:
        return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()

    root = report / "tensorboard"
    systems = {"magnitude", "hgsp_taylor", "shortgpt", "shortgpt_512 table 2", "wanda _b_"}
    assert {path.name for path in root.iterdir() if path.is_dir()} == systems
    comparison, system = read(root), read(root / "hgsp_taylor")
    perplexities = [(point.step, point.value) for point in system.Scalars("comparison/perplexity/demo")]
    assert perplexities == [(20, 11.25), (50, 31.0)]  # over the ratio in percent

    units = next(run for run in result.runs if (run.label, run.requested) == ("hgsp_taylor", 0.5)).units
    points = system.Scalars("comparison 50 %/share of importance")
    shares = [sum(units.importance[units.layer == layer]) / sum(units.importance) for layer in range(4)]
    assert [point.step for point in points] == [0, 1, 2, 3]
    assert [point.value for point in points] == pytest.approx(shares, rel=1e-5)

    stored = comparison.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    categories = {category.title: category for category in Layout.FromString(stored).category}
    assert list(categories) == ["comparison 20 %", "comparison 50 %", "comparison table 2 20 %"]
    for title in list(categories)[:2]:
        series = [series for chart in categories[title].chart for series in chart.margin.series]
        assert len(series) == 3
        assert all(one.value == one.lower == one.upper for one in series)  # a margin of width 0
        assert {one.value for one in series} == {tag for tag in system.Tags()["scalars"] if tag.startswith(f"{title}/")}


def test_page_shows_what_systems_write_side_by_side(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        run = make_run(tmp_path, name)
        written = {"repeated_4grams": None, "ended": 0.0}
        example = {"prompt": "Once <b>", "dense": "upon a time", "pruned": f"there was {name}"}
        sizes = {"evaluation_set": "demo", "prompts": 1, "prompt_tokens": 3, "new_tokens": 3, "common_beginning": 0.0}
        facts = ContinuationFacts.model_validate({**sizes, "dense": written, "pruned": written, "examples": [example]})
        runs.append(replace(run, metrics=run.metrics.model_copy(update={"continuations": facts})))
    write_report(audit(runs), [], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    row = "<tr><td>Once &lt;b&gt;</td><td>upon a time</td><td>there was a</td><td>there was b</td></tr>"
    assert row in page
    assert page.index("What they write") < page.index("Kept by layer")
