"""Run command lines in this process and judge them: done cleanly, or refused in one sentence with nothing left.

A file of hostile cases is a table of ``Case``s and a test that gives each to ``bench.check``. In a case's words,
``MODEL``, ``READER`` and ``TOKENS`` stand for what is in ``stock`` (see ``conftest.py``), ``ROOT`` for a fresh root of
runs, and ``INPUTS`` for the case's own folder.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.cli import main

Change = Callable[[Path], object]  # of a file, or of what is in a folder
Says = str | tuple[str, ...]
Status = int | tuple[int, ...]
LIMIT = 20  # seconds; tests/hostile/conftest.py puts it on every test
CONFIGS = Path(__file__).parents[2] / "configs"
# What the commands that read a run folder are asked, where RUN in INPUTS is one.
READERS = {
    "decide": "--run INPUTS/run --trainer.default_root_dir ROOT --trainer.accelerator cpu --trainer.logger false",
    "compare": "--runs INPUTS/run --root ROOT",
    "apply": "--plan INPUTS/run/plan.json --model MODEL --output ROOT",
    "evaluate": "--model INPUTS/run --output ROOT --efficiency --prompt-length 2 --decode-length 2 --repeats 1 "
    "--batch-sizes 1",
    "export": "--format stock --model INPUTS/pruned --output ROOT",
}
# Each is a sign that an error of Python or of a library went to the user as it was.
FOREIGN = (
    *("Traceback", "Parser key", "NestedArg", "Given value", "has no attribute", "NoneType", "not supported between"),
    *("unsupported operand", "unexpected keyword", "positional argument", "object is not", "Errno", "assert"),
    "MisconfigurationException",
)


@dataclass(frozen=True)
class Case:
    """One command line."""

    arguments: str | list[str] = ""  # what is hostile, after the harmless base options
    status: Status = 2  # 0 done, 2 refused; both where either is right depending on the machine
    says: Says = ()  # words that the one message must contain
    prepare: Change | None = None  # makes the files the case needs in ``INPUTS``
    command: str = "fit"
    config: str = "wanda"  # shipped configuration of ``fit``
    base: bool = True  # whether the harmless options come first
    needs: str = ""  # names in ``stock`` of what is copied to ``INPUTS`` first
    writes: bool = False  # to ``INPUTS``, which nothing else may change


def cases(table: dict[str, Case]) -> pytest.MarkDecorator:
    """A test of each ``case``."""
    return pytest.mark.parametrize("case", table.values(), ids=table)


@dataclass
class Bench:
    """Where cases run: the ``stock``, and a folder of the case's own."""

    stock: Path
    folder: Path
    capture: pytest.CaptureFixture[str]
    inputs: Path = field(init=False)
    root: Path = field(init=False)

    def __post_init__(self) -> None:
        self.inputs, self.root = self.folder / "inputs", self.folder / "root"
        self.inputs.mkdir()

    def argv(self, case: Case) -> list[str]:
        """The whole command line of a case."""
        hostile = shlex.split(case.arguments) if isinstance(case.arguments, str) else case.arguments
        hostile = [*(self.base(case) if case.base else []), *hostile]
        words = {"MODEL": self.stock / "model", "READER": self.stock / "reader", "TOKENS": self.stock / "tokens.npy"}
        for word, path in (words | {"ROOT": self.root, "INPUTS": self.inputs}).items():
            hostile = [argument.replace(word, str(path)) for argument in hostile]
        return [case.command, *hostile]

    def base(self, case: Case) -> list[str]:
        """Options under which the command works."""
        if case.command in READERS:
            return READERS[case.command].split()
        options = ["--config", str(CONFIGS / f"{case.config}.yaml")] if case.command == "fit" else []
        options += ["--model.pretrained", "MODEL", "--trainer.default_root_dir", "ROOT"]
        options += ["--trainer.accelerator", "cpu", "--data.cache_dir", str(self.folder / "cache")]
        # Whose picture takes a third of a run, and what takes half of one that evaluates.
        options += ["--trainer.logger", "false", "--data.continuations", "0"]
        if case.command == "test":
            return [*options, "--data.eval_datasets", "[TOKENS]"]
        return [*options, "--data.dataset", "TOKENS", "--data.eval_datasets", "[]"]

    def check(self, case: Case) -> None:
        """Run a case: the status is an allowed one, no traceback and no words of another library are printed. Refused:
        one line says so and nothing exists at ``ROOT``. Done: the run is complete and no temporary file is left."""
        if case.prepare is not None:
            case.prepare(self.inputs)
        before = contents(self.inputs)
        self.capture.readouterr()
        status = main(self.argv(case))
        err = self.capture.readouterr().err
        allowed = case.status if isinstance(case.status, tuple) else (case.status,)
        assert status in allowed, f"exit status {status}, allowed {allowed}\n{err[-3000:]}"
        assert not [word for word in FOREIGN if word in err], err
        assert case.writes or contents(self.inputs) == before
        if status == 2:
            (message,) = [line for line in err.splitlines() if line.startswith("error: ")]
            for words in (case.says,) if isinstance(case.says, str) else case.says:
                assert words in message
            assert not os.path.lexists(self.root), sorted(self.root.rglob("*"))
        elif status == 0:
            files = sorted(path for path in self.root.rglob("*") if path.is_file())
            assert not [path for path in files if path.name.startswith(".")], files
            if case.command == "fit":
                (metrics,) = [path for path in files if path.name == "metrics.json"]
                for name in ("plan.json", "scores.csv", "config.yaml", "pruned/config.json", "pruned/README.md"):
                    assert (metrics.parent / name).is_file(), name


def making(content: Change | str | bytes) -> Change:
    """What makes a file: from its content, or a function that gets its path."""
    if callable(content):
        return content
    data = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(data)


def broken(inputs: Path) -> None:
    """A file, and a link to itself, where a folder is expected."""
    (inputs / "f").touch()
    (inputs / "l").symlink_to("l")


def edited(model: str, **keys: Any) -> Change:
    """What replaces ``keys`` in the config.json of a model in ``INPUTS``."""

    def edit(folder: Path) -> None:
        file = folder / model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return edit


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with what files of a usual size hold."""
    found: dict[str, bytes | None] = {}
    for path in folder.rglob("*"):
        found[str(path)] = None
        with suppress(OSError):
            if path.is_file() and path.stat().st_size < 10**7:
                found[str(path)] = path.read_bytes()
    return found
