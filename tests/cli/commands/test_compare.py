import os
import re
from pathlib import Path

import pytest

from lightning_prune import cli
from lightning_prune.cli.commands.compare import main
from lightning_prune.comparison import report
from lightning_prune.comparison.report import NAMES
from lightning_prune.runs.folder import RunFolder
from lightning_prune.support.errors import UserError
from tests.comparison.fake_run import write_run


@pytest.fixture(autouse=True)
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time; tests/comparison looks at them."""
    monkeypatch.setattr(report, "charts", lambda audit: [])


def test_runs_that_exist_are_compared_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path, "wanda"), write_run(tmp_path, "magnitude", no_data=True, perplexity=250.0)]
    unfinished = tmp_path / "wanda" / "version_7"
    unfinished.mkdir()
    arguments = ["--runs", *map(str, [*folders, unfinished]), "--root", str(tmp_path), "--strict"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert f"left out, not a finished pruning run: {unfinished}" in shown
    assert "unusable" in next(line for line in shown.splitlines() if line.startswith("magnitude"))
    assert shown.splitlines()[-1] == f"report: {tmp_path / 'comparison' / 'version_0' / 'report.html'}"
    names = {"report.html", "report.md", "results.csv", "results.tex", "calibration_appendix.md"}
    assert names <= {path.name for path in (tmp_path / "comparison" / "version_0").iterdir()}
    # logs/*/version_* now holds the report, too, which is no run and not worth a remark.
    assert main([*arguments[:3], str(tmp_path / "comparison" / "version_0"), *arguments[4:]]) == 0
    assert "left out" not in capsys.readouterr().out


def test_strict_refuses_runs_that_differ_and_names_the_fact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path, "wanda"), write_run(tmp_path, "taylor", calibration={"seed": 1})]
    assert main(["--runs", *map(str, folders), "--output", str(tmp_path / "report"), "--strict"]) == 3
    assert re.search(r"calibration seed\s+1\s+taylor", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give either --config FILE"),
        ("--config a.yaml --runs b", "give either --config FILE"),
        ("--config nowhere.yaml", "--config: cannot read 'nowhere.yaml'"),
        ("--config wanda", "'wanda' is a method, .* Give --config compare --systems wanda"),
        ("--config a.yaml --seed 1", "unrecognized argument '--seed'"),
        ("--runs b --include-path c", "--include-path belongs to --zero-shot"),
    ],
)
def test_mistake_in_the_options_is_named(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments.split())


@pytest.mark.parametrize("near", ["..", "pruned"])
def test_the_run_folder_that_was_meant_is_named(near: str, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "pruned").mkdir(exist_ok=True)
    given = run.parent if near == ".." else run / near
    with pytest.raises(UserError, match=f"none of .* is a finished pruning run.* give (the run's folder, )?'{run}'"):
        main(["--runs", str(given), "--root", str(tmp_path)])
    with pytest.raises(UserError, match=f"not a finished pruning run\\. .* give (the run's folder, )?'{run}'"):
        RunFolder.open(given, "--run")


def test_broken_run_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "metrics.json").write_text('{"method": {}}')
    with pytest.raises(UserError, match=r"version_0/metrics.json' is not valid: perplexity is missing"):
        main(["--runs", str(folder), "--root", str(tmp_path)])


def compare(root: Path, *more: object) -> int:
    run = root / "wanda" / "version_0"
    folder = run if run.exists() else write_run(root)
    return cli.main(["compare", "--runs", str(folder), "--root", str(root), *map(str, more)])


def test_report_is_replaced_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report"
    assert compare(tmp_path, "--output", output) == 0
    assert set(os.listdir(output)) >= NAMES
    (output / "results.csv").write_text("old")
    (output / "precision.csv").write_text("which the new report has no use for")
    assert compare(tmp_path, "--output", output) == 2
    assert "--overwrite to replace that one" in capsys.readouterr().err
    assert (output / "results.csv").read_text() == "old"
    assert compare(tmp_path, "--output", output, "--overwrite") == 0
    assert (output / "results.csv").read_text() != "old"
    assert set(os.listdir(output)) == NAMES | {"tensorboard"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "wanda"]
    (tmp_path / "empty").mkdir()
    assert compare(tmp_path, "--output", tmp_path / "empty") == 0
    assert compare(tmp_path, "--overwrite") == 2
    assert "--overwrite belongs to --output" in capsys.readouterr().err
