"""Run folders that are damaged, forged or mixed, for every command that reads one: refused, or not believed."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import lightning_prune
from lightning_prune.cli import main
from lightning_prune.errors import UserError
from tests.hostile.harness import CONFIGS, Bench, Case

Change = Callable[[Path], object]  # of a file, or of the run folder
Status = int | tuple[int, ...]
TEST = "test"  # reads the checkpoint only
READERS = {
    "metrics.json": ("decide", "compare"),
    "environment.json": ("decide", "compare"),
    "calibration.json": ("decide", "compare"),
    "method.json": ("decide", "compare"),
    "scores.csv": ("decide", "compare"),
    "plan.json": ("decide", "compare", "apply"),
    "config.yaml": ("decide",),
    "pruned/config.json": ("evaluate", TEST, "mend", "load"),
    "pruned/model.safetensors": ("evaluate", TEST, "load"),
    "pruned/modeling_pruned.py": ("evaluate", TEST, "load", "mend"),
}
CASES: dict[str, tuple[str, Change, str, Status, str | tuple[str, ...]]] = {}  # command, change, file, status, says


def damage(name: str, file: str, change: Change, says: str | tuple[str, ...] = "", **status: Status) -> None:
    """A case for every command that reads ``file``: refused, unless ``status`` says otherwise of a command."""
    for command in READERS[file]:
        CASES[f"{command}: {file} {name}"] = (command, change, file, status.get(command, status.get("every", 2)), says)


def field(file: str, where: str, value: Any, says: str | tuple[str, ...] = "", **status: Status) -> None:
    """One value of a JSON file replaced; ``where`` is its path, such as ``layers.0.layer``."""
    damage(f"{where} = {value!r:.30}", file, lambda path: edit(path, where, value), says, **status)


def rows(name: str, change: Callable[[list[str]], list[str]], says: str = "", **status: Status) -> None:
    """The lines of ``scores.csv``, without the header, changed."""

    def run(path: Path) -> None:
        header, *found = path.read_text().splitlines()
        path.write_text("\n".join([header, *change(found)]) + "\n")

    damage(name, "scores.csv", run, says, **status)


def cell(column: str, value: Any, says: str = "", row: int = 3) -> None:
    """One value of ``scores.csv`` replaced."""
    at = COLUMNS.index(column)

    def change(found: list[str]) -> list[str]:
        values = found[row].split(",")
        values[at] = str(value)
        return [*found[:row], ",".join(values), *found[row + 1 :]]

    rows(f"{column} = {value!r:.30}", change, says)


def edit(path: Path, where: str, value: Any) -> None:
    content = json.loads(path.read_text())
    *parents, last = [int(part) if part.isdigit() else part for part in where.split("/")]
    inner = content
    for part in parents:
        inner = inner[part]
    inner[last] = value
    path.write_text(json.dumps(content))


def text(content: str | bytes) -> Change:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def instead(make: Change) -> Change:
    def run(path: Path) -> None:
        path.unlink()
        make(path)

    return run


def cut(share: float) -> Change:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 10**12)


def twice(path: Path) -> None:
    """Every key given twice, the second time as null."""
    content = path.read_text().rstrip()
    path.write_text(content[:-1] + ", " + ", ".join(f"{json.dumps(key)}: null" for key in json.loads(content)) + "}")


COLUMNS = ("layer", "block", "unit", "importance", "cost", "prior", "score", "pruned")
JSON = tuple(file for file in READERS if file.endswith(".json"))
IGNORED = {"evaluate": 0, TEST: 0, "load": 0}  # the package's own class is used, never the folder's code

for file in READERS:
    code = IGNORED if file.endswith(".py") else {}
    mended = {**code, "mend": 0} if code else {}  # what is no file of somebody else's is written anew
    damage("is missing", file, Path.unlink, **mended)
    damage("is empty", file, text(""), **code)
    damage("is a folder", file, instead(Path.mkdir), **code)
    damage("is a pipe", file, instead(os.mkfifo), **mended)
    damage("is a device", file, instead(lambda path: path.symlink_to("/dev/zero")), **mended)
    damage("links to itself", file, instead(lambda path: path.symlink_to(path)), **mended)
    damage("is huge", file, sparse, **code)
    damage("is binary", file, text(bytes(range(256)) * 9), **code)
    damage("is deep", file, text("[" * 100_000), **code)
    damage("is cut early", file, cut(0.2), **code)
    damage("is cut late", file, cut(0.97), **mended)
for file in JSON:
    damage("is null", file, text("null"))
    damage("is a list", file, text("[]"))
    damage("is a number", file, text("3"))
    damage("is an empty object", file, text("{}"))
    damage("holds a huge number", file, text('{"a": ' + "9" * 5000 + "}"))
    damage("is Latin-1", file, text('{"a": "é"}'.encode("latin-1")))
    damage("gives every key twice", file, twice)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, hostile_model: Path, hostile_tokens: Path) -> Path:
    """Two finished runs of one model, ``run`` and ``other``, which no case may change."""
    folder = tmp_path_factory.mktemp("runs")
    for name, ratio in (("run", "0.3"), ("other", "0.4")):
        arguments = ["fit", "--config", str(CONFIGS / "wanda.yaml"), "--model.pretrained", str(hostile_model)]
        arguments += ["--trainer.default_root_dir", str(folder / "root"), "--trainer.accelerator", "cpu"]
        arguments += ["--data.dataset", str(hostile_tokens), "--data.eval_datasets", f"[{hostile_tokens}]"]
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            assert main([*arguments, "--model.pruning_ratio", ratio, "--trainer.logger", "false"]) == 0
        (made,) = (folder / "root").glob("*/version_*")
        made.rename(folder / name)
    return folder


@pytest.fixture
def copied(bench: Bench, runs: Path) -> Iterator[Bench]:
    """With copies of both runs in ``INPUTS``; what is refused or read may not change there."""
    shutil.copytree(runs, bench.inputs, dirs_exist_ok=True)
    return bench


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 10**7]
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", CASES)
def test_run_folder(name: str, copied: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    command, change, file, status, says = CASES[name]
    monkeypatch.chdir(copied.inputs)
    change(copied.inputs / "run" / file)
    before = contents(copied.inputs)
    if command == "load":
        check_load(copied.inputs / "run/pruned", status)
    else:
        arguments = "--model.pretrained INPUTS/run/pruned" if command == TEST else ""
        copied.check(Case(arguments, status, says, command=command))
    if (command, status) != ("mend", 0):
        assert contents(copied.inputs) == before


def check_load(folder: Path, status: Status) -> None:
    try:
        lightning_prune.load(folder)
    except UserError:
        assert status != 0
    else:
        assert status != 2
