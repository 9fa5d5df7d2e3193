import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.cli import main
from lightning_prune.formats import gguf_file
from tests.formats.checkpoints import save
from tests.tiny import mixed_plan

pytest.importorskip("gguf")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(tmp_path / "run" / "pruned", plan=mixed_plan)
    return tmp_path / "run" / "pruned"


@pytest.fixture
def export(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command with its output at ``out``; returns what a refusal says, nothing where it works."""

    def run(form: str, *options: str, source: Path = model) -> str:
        words = ["--model", str(source), "--format", form, "--output", str(tmp_path / "out"), *options]
        status = main(["export", *words])
        message = capsys.readouterr().err
        assert status == (2 if "error: " in message else 0)
        return message if status else ""

    return run


@pytest.mark.parametrize("form", ["gguf", "stock"])
def test_what_exists_is_replaced_only_on_request(form: str, model: Path, tmp_path: Path, export: Callable) -> None:
    def written() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in tmp_path.glob("out" if form == "gguf" else "out/*")}

    assert not export(form)
    before = written()
    assert f"--output: '{tmp_path / 'out'}' exists. Give another name, or add --overwrite." in export(form)
    assert not export(form, "--overwrite", source=model.parent)  # a run folder stands for its checkpoint
    assert written() == before
    assert before


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, export: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    values, written = gguf_file._values, []

    def full(*arguments: Any) -> Any:
        written.append(arguments)
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        return values(*arguments)

    monkeypatch.setattr(gguf_file, "_values", full)
    assert "--output: cannot write below" in export("gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_package_that_is_missing_is_named(export: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "the package gguf. Install it in the clone: pip install '.[gguf]'" in export("gguf")
