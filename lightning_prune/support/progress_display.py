"""Progress on stderr: one area that is drawn anew on a terminal; elsewhere a line per phase, and now and then one more.

A log file, a batch system or a notebook cell gets lines: what is drawn over there would pile up.
"""

import os
import sys
import time
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_prune.support.memory import memory_in_use

LINE_EVERY = 30.0  # seconds between two lines of a phase that takes long
DRAW_EVERY = 0.1  # seconds between two drawings of the area


@dataclass(frozen=True)
class Status:
    """Where a run is.

    Attributes:
        phase: what is under way, the ``number``-th of ``phases`` that are known.
        at: where in it; may be empty.
        share: of the phase's work that is done, 0 … 1.
        fraction: of the whole run's work that is done, 0 … 1.
        seconds: since the run began.
        left: seconds to its end, where they can be told.
    """

    phase: str
    at: str
    number: int
    phases: int
    share: float
    fraction: float
    seconds: float
    left: float | None


class Display(Protocol):
    """What shows a run's progress."""

    def moved(self, status: Status) -> None:
        """Some work is done. Called often."""

    def ended(self, phase: str, seconds: float) -> None:
        """A phase is over."""

    def close(self) -> None:
        """The run is over, or has failed."""


def display_for() -> Display:
    """An area where stderr is a terminal that can move its cursor, else lines."""
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        return Area()
    return Lines()


class Lines:
    """A line at the end of every phase, and every ``LINE_EVERY`` seconds of a long one."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def moved(self, status: Status) -> None:
        """A line where the last one is long ago."""
        if time.monotonic() - self._last < LINE_EVERY:
            return
        left = "" if status.left is None else f", about {clock(status.left)} left"
        at = f" ({status.at})" if status.at else ""
        self._print(f"{status.phase}{at}: {status.fraction:.0%} of the run after {clock(status.seconds)}{left}")

    def ended(self, phase: str, seconds: float) -> None:
        """The phase's last line."""
        self._print(ending(phase, seconds))

    def close(self) -> None:
        """Lines stay."""

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        self._last = time.monotonic()


class Area:
    """Two rows at the foot of the terminal, the phase and the whole run; finished phases stand above as lines."""

    def __init__(self) -> None:
        from rich.console import Console  # only where there is a terminal to draw on
        from rich.progress import BarColumn, Progress, TextColumn

        self._rows = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[note]}", markup=False),
            auto_refresh=False,  # no thread beside what is timed
            console=Console(file=sys.stderr, highlight=False),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what is printed to a file must not come here
        )
        self._phase: Any = self._rows.add_task("", total=1.0, note="", visible=False)
        self._run: Any = self._rows.add_task("", total=1.0, note="", visible=False)
        self._drawn = float("-inf")
        self._rows.start()

    def moved(self, status: Status) -> None:
        """New numbers in both rows."""
        now = time.monotonic()
        if now - self._drawn < DRAW_EVERY:
            return
        self._drawn = now
        left = "" if status.left is None else f"about {clock(status.left)} left, "
        update = self._rows.update
        update(self._phase, description=status.phase, completed=status.share, note=status.at, visible=True)
        update(
            self._run,
            description=f"phase {status.number} of {status.phases}, {clock(status.seconds)}",
            completed=status.fraction,
            note=f"{left}{memory_in_use()}",
            visible=True,
        )
        self._rows.refresh()

    def ended(self, phase: str, seconds: float) -> None:
        """The phase becomes a line above the area."""
        self._drawn = float("-inf")
        self._rows.console.print(ending(phase, seconds), markup=False)

    def close(self) -> None:
        """The area goes; the lines stay."""
        self._rows.stop()


def ending(phase: str, seconds: float) -> str:
    """What stays of a phase: ``calibrating: 12.3 s``."""
    return f"{phase}: {seconds:.1f} s" if seconds < 60 else f"{phase}: {clock(seconds)}"


def clock(seconds: float) -> str:
    """``1:05`` or ``2:00:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
