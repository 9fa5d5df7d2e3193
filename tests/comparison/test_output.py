import os
from pathlib import Path

import pytest

from lightning_prune.cli import main
from lightning_prune.comparison import report
from lightning_prune.comparison.report import NAMES
from tests.comparison.fake_run import write_run


@pytest.fixture(autouse=True)
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time and change nothing here."""
    monkeypatch.setattr(report, "charts", lambda audit: [])


def compare(root: Path, *more: object) -> int:
    run = root / "wanda" / "version_0"
    folder = run if run.exists() else write_run(root)
    return main(["compare", "--runs", str(folder), "--root", str(root), *map(str, more)])


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("kind", ["file", "folder", "run", "report and more", "link", "half a report"])
def test_what_is_no_report_of_ours_is_never_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, overwrite: list[str]
) -> None:
    output = tmp_path / "precious"
    if kind == "file":
        output.write_text("thesis")
    elif kind == "run":
        output = write_run(tmp_path)
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        output.symlink_to(tmp_path / "elsewhere")
    else:
        output.mkdir()
        names = {"folder": {"notes.txt"}, "report and more": NAMES | {"notes.txt"}, "half a report": {"report.html"}}
        for name in names[kind]:
            (output / name).write_text("mine")
    write_run(tmp_path / "runs")
    before = everything(tmp_path)
    assert compare(tmp_path / "runs", "--output", output, *overwrite) == 2
    assert f"error: --output: '{output}' exists and is not a " in capsys.readouterr().err
    assert everything(tmp_path) == before


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


@pytest.mark.parametrize("name", ["x" * 300, "file/below", "loop/below", "a\0b"])
def test_output_that_cannot_be_written_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert compare(tmp_path, "--output", tmp_path / name) == 2
    assert "error: --output: " in capsys.readouterr().err
