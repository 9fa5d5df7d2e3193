"""How far a whole run is: every phase takes from one amount of work, so there is one estimate for all.

The unit of work is one token through one decoder layer. Other work is stated in it: a backward costs about two more, a
solver what its matrix products cost.
"""

import time

from lightning_prune.support.progress_display import Display, Status, display_for


class Progress:
    """Shown on stderr, or nowhere where ``shown`` is false.

    Example::

        progress = Progress()
        progress.expect("calibrating", 16_384 * 32)
        progress.advance("calibrating", 512, "layer 1 of 32")
        progress.finish("calibrating")
        progress.close()
    """

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self._expected: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._started: float | None = None
        self._phase_started = 0.0
        self._phase: str | None = None  # the one that is under way
        self._display: Display | None = None

    def expect(self, phase: str, work: float) -> None:
        """Announce a phase's work. Again for the same phase: a better estimate replaces the old one."""
        self._expected[phase] = work
        self._begin()

    def advance(self, phase: str, work: float, at: str = "") -> None:
        """Some of a phase's work is done; ``at`` says where in the phase, such as "layer 3 of 32"."""
        if not self.shown:
            return
        self._begin()
        done = self._done.get(phase, 0.0) + work
        # An estimate that was too low grows with the work, rather than holding the bar at its end.
        self._expected[phase] = max(self._expected.get(phase, 0.0), done)
        self._done[phase] = done
        self._phase = phase
        self._show(phase, at)

    def finish(self, phase: str) -> None:
        """A phase is over, however much it was said to be."""
        self._done[phase] = self._expected[phase] = max(self._done.get(phase, 0.0), self._expected.get(phase, 0.0))
        if self.shown and self._phase == phase:
            self._ended(phase)
        self._phase, self._phase_started = None, time.monotonic()

    def close(self) -> None:
        """Nothing more is shown; what was said of finished phases stays."""
        if self._display is not None:
            self._display.close()
            self._display = None

    @property
    def fraction(self) -> float:
        """Work done of all that is expected, 0 … 1."""
        total = sum(self._expected.values())
        return sum(self._done.values()) / total if total else 0.0

    def part(self, phase: str) -> "Progress":
        """One for a run that is the phase ``phase`` of this one, of work 1."""
        return _Part(self, phase)

    def _begin(self) -> None:
        if self._started is None:
            self._started = self._phase_started = time.monotonic()

    def _show(self, phase: str, at: str) -> None:
        if self._display is None:
            self._display = display_for()
        assert self._started is not None
        seconds, fraction = time.monotonic() - self._started, self.fraction
        phases = list(self._expected)
        self._display.moved(
            Status(
                phase=phase,
                at=at,
                number=phases.index(phase) + 1,
                phases=len(phases),
                share=self._done[phase] / self._expected[phase] if self._expected[phase] else 0.0,
                fraction=fraction,
                seconds=seconds,
                left=seconds * (1 / fraction - 1) if fraction else None,
            )
        )

    def _ended(self, phase: str) -> None:
        if self._display is not None:
            self._display.ended(phase, time.monotonic() - self._phase_started)


class _Part(Progress):
    """Tells the whole instead of showing anything itself."""

    def __init__(self, whole: Progress, phase: str) -> None:
        super().__init__(whole.shown)
        self._whole, self._name, self._told = whole, phase, 0.0

    def _show(self, phase: str, at: str) -> None:
        told = max(self._told, self.fraction)  # an estimate that grows must not take back what was told
        self._whole.advance(self._name, told - self._told, f"{phase}, {at}" if at else phase)
        self._told = told
