"""What comes from outside (labels, names of data sets and models, error messages) cannot act in any report file."""

import csv
import re
import unicodedata
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.comparison.audit import Audit, audit
from lightning_prune.comparison.records import Run
from lightning_prune.comparison.report import write_report
from lightning_prune.comparison.sections import sections, terminal
from lightning_prune.runs.records import Failure, MethodDetails
from tests.comparison.fake_run import make_run

HOSTILE = "<script>alert(1)</script>|x\n\n# head `$x^{$ ![i](http://e.com/i) \x1b[2J\x9b1m\u202e\udc80 \\\\ & % \"'"
IN_A_FILE = HOSTILE.replace("\udc80", "")  # which no JSON file can hold
FILES = ("report.html", "report.md", "results.csv", "results.tex", "calibration_appendix.md")


def poisoned(run: Run) -> Run:
    """``run`` with the hostile text wherever a run folder holds text of its own."""

    def hostile(record: Any, *names: str, **more: Any) -> Any:
        return record.model_copy(update=dict.fromkeys(names, IN_A_FILE) | more)

    metrics, environment = run.metrics, run.environment
    method = hostile(metrics.method, "name", "base_model", label=run.label + IN_A_FILE)
    evaluation = {IN_A_FILE: hostile(metrics.evaluation["demo"], "bos", "split", "fingerprint")}
    perplexity = {IN_A_FILE: metrics.perplexity["demo"]}
    cpu, packages = environment.cpu | {"name": IN_A_FILE}, {IN_A_FILE: IN_A_FILE}
    details = {"method": "m", "label": "l", IN_A_FILE: IN_A_FILE, "list": [IN_A_FILE], "deep": {IN_A_FILE: IN_A_FILE}}
    return replace(
        run,
        metrics=hostile(metrics, perplexity=perplexity, evaluation=evaluation, method=method),
        environment=hostile(environment, "platform", "device", cpu=cpu, packages=packages),
        calibration=hostile(run.calibration, "dataset", "split", "fingerprint", "revision", "configuration"),
        details=MethodDetails.model_validate(details),
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    root = tmp_path_factory.mktemp("runs")
    runs = [poisoned(make_run(root, label, seed=seed)) for seed, label in enumerate(("_a", "b"))]
    return audit([*runs, make_run(root, "c", base_model=IN_A_FILE, weights=None)])


@pytest.fixture(scope="module")
def report(result: Audit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(result, [Failure(HOSTILE, 0.3, f"RuntimeError: {HOSTILE}")], folder / "report")
    return folder / "report"


@pytest.mark.parametrize("name", FILES)
def test_no_control_character_no_tag_and_no_image_reaches_a_file(report: Path, name: str) -> None:
    text = (report / name).read_text(encoding="utf-8")
    if name == "report.html":  # without the script of the charts, which is the library's
        text = re.sub(r"<script>.*?</script>", "", text, count=1, flags=re.DOTALL)
        text = re.sub(r'<script type="application/json">[^<]*</script>', "", text)
    assert {character for character in text if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl")} <= {"\n"}
    if name != "results.csv":
        assert text.count("<script") == (1 if name == "report.html" else 0)  # the page's own, which sorts tables
        assert name == "report.html" or "![i](" not in text


@pytest.mark.parametrize("name", ["report.md", "calibration_appendix.md"])
def test_every_line_of_markdown_was_written_by_the_report(report: Path, name: str) -> None:
    lines = (report / name).read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.startswith("# head")]
    columns = 0
    for line in lines:
        if not line.startswith("|"):
            columns = 0
            continue
        found = line.replace("\\\\", "").replace("\\|", "").count("|")
        assert columns in (0, found), line
        columns = found


def test_csv_has_one_line_per_run_and_latex_rows_keep_their_cells(report: Path) -> None:
    text = (report / "results.csv").read_text(encoding="utf-8")
    assert len(text.splitlines()) == len(list(csv.reader(text.splitlines()))) == 1 + 3 + 1
    text = (report / "results.tex").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.endswith(r"12.500 \\") and "script" in line]
    assert len(rows) == 2
    assert {row.replace(r"\&", "").count("&") for row in rows} == {1}
    assert "alert(1)\\textless{}/script\\textgreater{}\\textbar{}x \\# head" in rows[0]


def test_terminal_shows_the_text_and_obeys_none_of_it(result: Audit) -> None:
    text = terminal(sections(result, [Failure(HOSTILE, 0.3, HOSTILE)]))
    assert "\\x1b[2J\\x9b1m\\u202e\\udc80" in text
    assert not {character for character in text if unicodedata.category(character) in ("Cc", "Cf", "Cs")} - {"\n"}
