"""A signal ends the block, wherever it strikes."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lightning_prune
from lightning_prune.cli import main
from lightning_prune.cli.commands import apply
from lightning_prune.support.signals import SIGNALS, stoppable


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


class Finalized:
    """Sends the signal from ``__del__``, where an exception is printed and forgotten."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        kill(self.number)
        time.sleep(0.01)  # so that the handler runs in here


def in_garbage_collection(number: int) -> None:
    one = Finalized(number)
    one.itself = one  # type: ignore[attr-defined]
    del one
    gc.collect()


def in_weak_reference_callback(number: int) -> None:
    target = type("Target", (), {})()
    reference = weakref.ref(target, lambda _: (kill(number), time.sleep(0.01)))
    del target
    assert reference() is None


def in_except_that_swallows_everything(number: int) -> None:
    try:
        kill(number)
        time.sleep(5)
    except BaseException:
        pass


@pytest.mark.parametrize(
    ("strike", "number"),
    [
        *((kill, number) for number in SIGNALS),
        *((Finalized, signal.SIGINT), (in_garbage_collection, signal.SIGTERM)),
        *((in_weak_reference_callback, signal.SIGINT), (in_except_that_swallows_everything, signal.SIGTERM)),
    ],
)
def test_command_ends_although_the_exception_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], strike: Callable[[int], object], number: int
) -> None:
    def command(argv: list[str]) -> int:
        strike(number)
        end = time.monotonic() + 30
        while time.monotonic() < end:  # the work that went on
            time.sleep(0.01)
        return 0

    before = {one: signal.getsignal(one) for one in SIGNALS}
    monkeypatch.setattr(apply, "main", command)
    started = time.monotonic()
    assert main(["apply"]) == 128 + number
    assert time.monotonic() - started < 5
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1] == f"interrupted by {signal.Signals(number).name}; nothing half-written is left"
    assert {one: signal.getsignal(one) for one in SIGNALS} == before


def test_clean_up_is_not_interrupted_by_further_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def command(argv: list[str]) -> int:
        try:
            kill(signal.SIGTERM)
            time.sleep(5)
        finally:
            for number in SIGNALS:
                kill(number)
            time.sleep(1)  # longer than a lost exception is waited for
            done.append(True)
        return 0

    monkeypatch.setattr(apply, "main", command)
    assert main(["apply"]) == 143
    assert done == [True]


def test_signal_at_the_last_moment_is_not_hidden() -> None:
    with stoppable() as stop:
        stop.over = True
        kill(signal.SIGTERM)
        time.sleep(0.01)
    assert stop.number == signal.SIGTERM


@pytest.mark.slow
def test_process_that_does_not_come_back_to_python_is_ended() -> None:
    code = (
        "import sys, time\nfrom lightning_prune.support import signals\nsignals.GRACE = 2\n"
        "from lightning_prune import cli\nfrom lightning_prune.cli.commands import apply\n"
        "def stuck(argv):\n    print('ready', flush=True)\n"
        "    import ctypes\n    libc = ctypes.CDLL(None)\n"
        "    while libc.usleep(500_000) in (0, -1):\n        pass\n"
        "def never(argv):\n"
        "    while True:\n        try:\n            stuck(argv)\n        except BaseException as error:\n"
        "            kept.append(error)\n"  # as if somebody were unwinding, for ever
        "kept = []\napply.main = never\nsys.exit(cli.main(['apply']))"
    )
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    here = {**os.environ, "PYTHONPATH": str(Path(lightning_prune.__file__).parents[1])}
    process: Any = subprocess.Popen([sys.executable, "-c", code], env=here, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    try:
        _, shown = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "did not end within 2 seconds and was killed" in shown


@pytest.mark.parametrize("interrupted", [False, True])
def test_finalizers_of_what_a_signal_left_half_made_say_nothing(
    interrupted: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    class HalfMade:
        def __del__(self) -> None:
            raise AttributeError("it was never finished")

    with stoppable() as stop:
        stop.number = signal.SIGINT if interrupted else None
        HalfMade()
        gc.collect()
        stop.number = None
    assert ("it was never finished" in capfd.readouterr().err) is not interrupted
