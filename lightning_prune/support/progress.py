"""How far a whole run is. The unit of work is one token through one decoder layer; other work is stated in it (a
backward costs about two more, a solver what its matrix products cost), so there is one estimate for all phases."""

import os
import sys
import time
from typing import Any, NamedTuple

from lightning_prune.support.devices import memory_in_use

LINE_EVERY = 30.0  # seconds between two lines of a phase that takes long
DRAW_EVERY = 0.1  # seconds between two drawings of the rows


class Status(NamedTuple):
    """How far a run is: its phase, share done and times."""

    phase: str
    at: str  # where in the phase
    number: int  # of the phase
    phases: int
    share: float  # of the phase's work that is done
    fraction: float  # of all work
    seconds: float
    left: float | None  # seconds to the run's end, where they can be told


class Progress:
    """Phases, announced by ``expect``, then each with ``advance`` and ``finish``, and ``close`` at the end. Shown on
    stderr, or nowhere where ``shown`` is false."""

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self._expected: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._started = self._phase_started = 0.0
        self._phase: str | None = None  # the one that is under way
        self._display: Lines | Rows | None = None

    def expect(self, phase: str, work: float) -> None:
        """Announce a phase's work. Again for the same phase: a better estimate replaces the old one."""
        if not self._expected:
            self._started = self._phase_started = time.monotonic()
        self._expected[phase] = work

    def advance(self, phase: str, work: float, at: str = "") -> None:
        """Count some work of a phase as done; ``at`` says where in the phase, such as "layer 3 of 32"."""
        if not self.shown:
            return
        self._phase, done = phase, self._done.get(phase, 0.0) + work
        # An estimate that was too low grows with the work, rather than holding the bar at its end.
        self.expect(phase, max(self._expected.get(phase, 0.0), done))
        self._done[phase] = done
        self._show(phase, at)

    def finish(self, phase: str, share: float = 1.0) -> None:
        """Count a phase, or this share of its work, as done, however much work was announced."""
        expected = self._expected.get(phase, 0.0)
        self._done[phase] = max(self._done.get(phase, 0.0), share * expected)
        self._expected[phase] = self._done[phase] if share == 1 else expected
        if self._display is not None and self._phase == phase:
            seconds = time.monotonic() - self._phase_started
            self._display.ended(f"{phase}: {seconds:.1f} s" if seconds < 60 else f"{phase}: {clock(seconds)}")
        self._phase, self._phase_started = None, time.monotonic()

    def close(self) -> None:
        """End the display; the lines of finished phases stay."""
        if isinstance(self._display, Rows):
            self._display.rows.stop()
        self._display = None

    @property
    def fraction(self) -> float:
        """Work done of all that is expected, 0 … 1."""
        total = sum(self._expected.values())
        return sum(self._done.values()) / total if total else 0.0

    def part(self, phase: str) -> "Progress":
        """A progress object for a run inside this one, which it counts as the phase ``phase``, of work 1."""
        return _Part(self, phase)

    def _show(self, phase: str, at: str) -> None:
        self._display = self._display or display_for()
        seconds, fraction, phases = time.monotonic() - self._started, self.fraction, list(self._expected)
        share = self._done[phase] / self._expected[phase] if self._expected[phase] else 0.0
        left = seconds * (1 / fraction - 1) if fraction else None
        self._display.moved(Status(phase, at, phases.index(phase) + 1, len(phases), share, fraction, seconds, left))


class _Part(Progress):
    """Progress of a run inside another one: reports to it instead of showing anything itself."""

    def __init__(self, whole: Progress, phase: str) -> None:
        super().__init__(whole.shown)
        self._whole, self._name, self._told = whole, phase, 0.0

    def _show(self, phase: str, at: str) -> None:
        told = max(self._told, self.fraction)  # an estimate that grows must not take back what was told
        self._whole.advance(self._name, told - self._told, f"{phase}, {at}" if at else phase)
        self._told = told


def display_for() -> "Lines | Rows":
    """Rows where stderr is a terminal that can move its cursor, else lines: in a log file or a notebook cell what is
    drawn over would pile up."""
    can_move = sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return Rows() if can_move else Lines()


class Lines:
    """A line at the end of every phase (``calibrating: 12.3 s``), and every ``LINE_EVERY`` seconds of a long one."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def moved(self, status: Status) -> None:
        if time.monotonic() - self._last >= LINE_EVERY:
            left = "" if status.left is None else f", about {clock(status.left)} left"
            at = f" ({status.at})" if status.at else ""
            self.ended(f"{status.phase}{at}: {status.fraction:.0%} of the run after {clock(status.seconds)}{left}")

    def ended(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        self._last = time.monotonic()


class Rows:
    """The phase and the whole run, at the foot of the terminal; finished phases are lines above them."""

    def __init__(self) -> None:
        from rich.console import Console  # only where there is a terminal to draw on
        from rich.progress import BarColumn, Progress, TextColumn

        self.rows = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[note]}", markup=False),
            auto_refresh=False,  # no thread beside what is timed
            console=Console(file=sys.stderr, highlight=False),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what is printed to a file must not come here
        )
        self._phase: Any = self.rows.add_task("", total=1.0, note="", visible=False)
        self._run: Any = self.rows.add_task("", total=1.0, note="", visible=False)
        self._drawn = float("-inf")
        self.rows.start()

    def moved(self, status: Status) -> None:
        if time.monotonic() - self._drawn < DRAW_EVERY:
            return
        self._drawn = time.monotonic()
        name = f"phase {status.number} of {status.phases}, {clock(status.seconds)}"
        left = "" if status.left is None else f"about {clock(status.left)} left, "
        for row, description, share, note in (
            (self._phase, status.phase, status.share, status.at),
            (self._run, name, status.fraction, f"{left}{memory_in_use()}"),
        ):
            self.rows.update(row, description=description, completed=share, note=note, visible=True)
        self.rows.refresh()

    def ended(self, line: str) -> None:
        self._drawn = float("-inf")
        self.rows.console.print(line, markup=False)


def clock(seconds: float) -> str:
    """``1:05`` or ``2:00:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
