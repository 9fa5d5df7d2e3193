import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.cli import main
from lightning_prune.export import gguf_file
from tests.export.checkpoints import save
from tests.tiny import mixed_plan

pytest.importorskip("gguf")


def export(model: Path, form: str, output: Path, *options: str) -> int:
    return main(["export", "--model", str(model), "--format", form, "--output", str(output), *options])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(tmp_path / "run" / "pruned", plan=mixed_plan)
    return tmp_path / "run" / "pruned"


@pytest.mark.parametrize("form", ["gguf", "stock"])
def test_what_exists_is_replaced_only_on_request(
    form: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert export(model, form, output) == 0
    before = {file.name: file.read_bytes() for file in ([output] if form == "gguf" else output.iterdir())}
    assert export(model, form, output) == 2
    assert f"--output: '{output}' exists. Give another name, or add --overwrite." in capsys.readouterr().err
    assert export(model.parent, form, output, "--overwrite") == 0  # a run folder stands for its checkpoint
    assert {file.name: file.read_bytes() for file in ([output] if form == "gguf" else output.iterdir())} == before


@pytest.mark.parametrize(("form", "kind"), [("gguf", "folder"), ("stock", "file")])
def test_a_file_does_not_take_the_place_of_a_folder(
    form: str, kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "there"
    output.mkdir() if kind == "folder" else output.touch()
    assert export(model, form, output, "--overwrite") == 2
    assert f"--output: '{output}' is " in capsys.readouterr().err


def test_a_disk_that_fills_up_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values, written = gguf_file._values, []

    def full(*arguments: Any) -> Any:
        written.append(arguments)
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        return values(*arguments)

    monkeypatch.setattr(gguf_file, "_values", full)
    assert export(model, "gguf", tmp_path / "m.gguf") == 2
    assert "--output: cannot write below" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_package_that_is_missing_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert export(model, "gguf", tmp_path / "m.gguf") == 2
    assert "pip install 'lightning-prune[gguf]'" in capsys.readouterr().err
