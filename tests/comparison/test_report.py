import csv
from pathlib import Path

from lightning_prune.comparison.audit import Audit
from lightning_prune.comparison.sections import sections, terminal


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
