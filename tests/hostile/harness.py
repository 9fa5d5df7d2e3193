"""Run command lines in this process and judge them: done cleanly, or refused in one sentence with nothing left.

A file of hostile cases is a table and one test::

    CASES = {
        "ratio above one": Case("--model.pruning_ratio 2", says="--model.pruning_ratio"),      # refused
        "ratio as text": Case("--model.pruning_ratio 2e-1", status=0),                          # works
    }

    @pytest.mark.parametrize("name", CASES)
    def test_options(name: str, bench: Bench) -> None:
        bench.check(CASES[name])

``bench`` (in ``conftest.py``) offers a tiny model and token array, a fresh root folder for each case and ``MODEL``,
``ROOT``, ``INPUTS`` as words that stand for their paths. ``Case.arguments`` go behind ``Bench.base(command)``, so a
case writes only what is hostile; ``Case.prepare`` gets its own ``INPUTS`` folder and makes the files it needs.

What is judged, always: the status is the expected one (0 done, 2 refused; a table may allow both where either is right
depending on the machine), no exception leaves ``main``, no traceback and no words of another library's parser are
printed, and nobody waits longer than ``LIMIT`` seconds. Refused: exactly one line starts with ``error: ``, it contains
``says``, and nothing exists at ``ROOT``. Done: the run folder is complete and no temporary file is left.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lightning_prune.cli import main

LIMIT = 20  # seconds; tests/hostile/conftest.py puts it on every test
CONFIGS = Path(__file__).parents[2] / "configs"
# What the commands that read a run folder are asked, where RUN in INPUTS is one.
READERS = {
    "decide": "--run INPUTS/run --trainer.default_root_dir ROOT --trainer.accelerator cpu",
    "compare": "--runs INPUTS/run --root ROOT",
    "apply": "--plan INPUTS/run/plan.json --model MODEL --output ROOT",
    "evaluate": "--model INPUTS/run --output ROOT --efficiency --prompt-length 2 --decode-length 2 --repeats 1 "
    "--batch-sizes 1",
    "export": "--format stock --model INPUTS/pruned --output ROOT",
}
# Each is a sign that an error of Python or of a library went to the user as it was.
FOREIGN = (
    "Traceback",
    "Parser key",
    "NestedArg",
    "Given value",
    "has no attribute",
    "NoneType",
    "not supported between",
    "unsupported operand",
    "unexpected keyword",
    "positional argument",
    "object is not",
    "Errno",
    "MisconfigurationException",
    "assert",
)


@dataclass(frozen=True)
class Case:
    """One command line.

    Attributes:
        arguments: what is hostile, as one shell-like line or as a list; follows the harmless base options.
        status: allowed exit status, or several.
        says: words (a string, or several) that the one message must contain.
        prepare: makes the files the case needs in the folder it gets (``INPUTS``).
        command: of lightning-prune.
        config: shipped configuration of ``fit``.
        base: whether the harmless options come first.
    """

    arguments: str | list[str] = ""
    status: int | tuple[int, ...] = 2
    says: str | tuple[str, ...] = ()
    prepare: Callable[[Path], object] | None = None
    command: str = "fit"
    config: str = "wanda"
    base: bool = True


@dataclass
class Bench:
    """Where cases run: a tiny ``model``, a token array ``tokens``, and a folder of the case's own."""

    model: Path
    tokens: Path
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
        words = {"MODEL": self.model, "ROOT": self.root, "INPUTS": self.inputs, "TOKENS": self.tokens}
        for word, path in words.items():
            hostile = [argument.replace(word, str(path)) for argument in hostile]
        return [case.command, *hostile]

    def base(self, case: Case) -> list[str]:
        """Options under which the command works."""
        if case.command in READERS:
            return READERS[case.command].split()
        options = ["--config", str(CONFIGS / f"{case.config}.yaml")] if case.command == "fit" else []
        options += ["--model.pretrained", str(self.model), "--trainer.default_root_dir", str(self.root)]
        options += ["--trainer.accelerator", "cpu", "--data.cache_dir", str(self.folder / "cache")]
        if case.command == "test":
            return [*options, "--data.eval_datasets", f"[{self.tokens}]"]
        return [*options, "--data.dataset", str(self.tokens), "--data.eval_datasets", "[]"]

    def check(self, case: Case) -> str:
        """Run a case and judge it.

        Returns:
            What was printed to stderr.
        """
        if case.prepare is not None:
            case.prepare(self.inputs)
        self.capture.readouterr()
        status = main(self.argv(case))
        printed = self.capture.readouterr()
        allowed = case.status if isinstance(case.status, tuple) else (case.status,)
        assert status in allowed, f"exit status {status}, allowed {allowed}\n{printed.err[-3000:]}"
        for word in FOREIGN:
            assert word not in printed.err, printed.err
        if status == 2:
            self._refused(case, printed.err)
        elif status == 0:
            self._done(case)
        return printed.err

    def _refused(self, case: Case, err: str) -> None:
        messages = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(messages) == 1, err
        for words in (case.says,) if isinstance(case.says, str) else case.says:
            assert words in messages[0], messages[0]
        assert not os.path.lexists(self.root), sorted(self.root.rglob("*"))

    def _done(self, case: Case) -> None:
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        assert not [path for path in files if path.name.startswith(".")], files
        if case.command == "fit":
            (metrics,) = [path for path in files if path.name == "metrics.json"]
            for name in ("plan.json", "scores.csv", "config.yaml", "pruned/config.json", "pruned/README.md"):
                assert (metrics.parent / name).is_file(), name


def unreadable(path: Path) -> bool:
    """Whether taking the right to read a file away has an effect: not for the superuser."""
    with suppress(OSError):
        path.read_bytes()
        return False
    return True
