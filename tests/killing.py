"""Runs of the command that are killed: at a named call, at a file operation, or after some seconds.

Importing takes longer than a run on a tiny model, and so does what the first run of a process pays for. So one process
imports everything, makes one run and does nothing else; every run that counts is a fork of it. ``python -m
tests.killing MODULE`` is that process, ``Forks`` talks to it; what runs is the module's ``main``.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


@dataclass(frozen=True)
class Kill:
    """When a run gets a signal: the first of what is given."""

    call: str | None = None  # ``module:Class.method``; the signal comes before its ``number``-th call, counted from 1
    number: int = 1
    operation: int | None = None  # the number of an operation of Python on files below ``below`` (open, rename, …)
    below: str = ""
    seconds: float | None = None  # after the run has begun
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    status: int  # negative: the signal that killed it
    printed: str
    seconds: float
    after_signal: float


class Forks:
    """The process that runs are forked from. ``module``: what has the ``main`` that runs."""

    def __init__(self, module: str = "lightning_prune.cli") -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.killing", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=REPOSITORY,
        )

    def run(self, argv: Sequence[str], kill: Kill | None = None, before: str = "") -> Ended:
        """One run; ``before``: a statement of Python that its process executes first."""
        return self.together([argv], kill, [before])[0]

    def together(
        self, argvs: Sequence[Sequence[str]], kill: Kill | None = None, before: Sequence[str] = ()
    ) -> list[Ended]:
        """Several runs at once."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"argvs": [list(argv) for argv in argvs], "kill": None if kill is None else asdict(kill)}
        request["before"] = list(before) or [""] * len(argvs)
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return [Ended(**found) for found in json.loads(self._process.stdout.readline())]

    def close(self) -> None:
        self._process.communicate()


def serve(module: str) -> None:
    """Fork for every line of stdin."""
    main = importlib.import_module(module).main
    modules = ["runs.experiment", "comparison.report", "comparison.audit", "checkpoint.write", "evaluation.efficiency"]
    modules += [f"cli.commands.{name}" for name in ("fit", "decide", "test", "compare", "apply", "evaluate")]
    for name in modules:
        importlib.import_module(f"lightning_prune.{name}")
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _make_one_run(main)
    for line in sys.stdin:
        request = json.loads(line)
        kill = None if request["kill"] is None else Kill(**request["kill"])
        runs = zip(request["argvs"], request["before"], strict=True)
        started = [_fork(main, argv, kill, before) for argv, before in runs]
        found = [asdict(_wait(*one, kill)) for one in started]
        answer.write(json.dumps(found) + "\n")
        answer.flush()


def _make_one_run(main: Callable[[list[str]], int]) -> None:
    """Not of a method that goes backward: on a device that starts threads, which no fork has. A mixture of experts is
    tried, too, which takes half of a run on one."""
    import numpy as np

    from lightning_prune.checkpoint.family_check import check_family
    from tests.tiny import make_moe, make_tiny, tiny_tokens

    check_family(make_moe(width=32, layers=3).config)

    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        make_tiny().save_pretrained(folder)
        np.save(f"{folder}/tokens.npy", tiny_tokens(2, 8).numpy())
        words = f"fit --config wanda --model.pretrained {folder} --data.dataset {folder}/tokens.npy"
        words += f" --data.eval_datasets [{folder}/tokens.npy] --trainer.default_root_dir {folder}/logs"
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            assert main(words.split()) == 0
    gc.collect()
    gc.freeze()


def _fork(main: Callable[[list[str]], int], argv: list[str], kill: Kill | None, before: str) -> tuple[int, int, float]:
    output = os.memfd_create("output")
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            exec(before)
            if kill is not None:
                _prepare(kill)
            status = main(argv)
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return child, output, begun


def _wait(child: int, output: int, begun: float, kill: Kill | None) -> Ended:
    sent = begun
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        now = time.monotonic()
        if done:
            break
        if kill is not None and kill.seconds is not None and sent == begun and now - begun >= kill.seconds:
            sent = now
            os.kill(child, kill.signal)
        if now - begun > 240:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    os.lseek(output, 0, 0)
    printed = b""
    while part := os.read(output, 2**16):
        printed += part
    os.close(output)
    return Ended(os.waitstatus_to_exitcode(status), printed.decode(errors="replace"), now - begun, now - sent)


def _prepare(kill: Kill) -> None:
    """In the child: see to it that the signal comes when it should."""
    if kill.call is not None:
        module, _, path = kill.call.partition(":")
        owner: Any = importlib.import_module(module)
        *classes, name = path.split(".")
        for one in classes:
            owner = getattr(owner, one)
        real, seen = getattr(owner, name), []

        def wrapper(*args: Any, **options: Any) -> Any:
            seen.append(1)
            if len(seen) == kill.number:
                os.kill(os.getpid(), kill.signal)
            return real(*args, **options)

        setattr(owner, name, wrapper)
    if kill.operation is not None:
        made = [0]

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event in OPERATIONS and str(args[0]).startswith(kill.below):
                made[0] += 1
                if made[0] == kill.operation:
                    os.kill(os.getpid(), kill.signal)

        sys.addaudithook(hook)


if __name__ == "__main__":
    serve(sys.argv[1])
