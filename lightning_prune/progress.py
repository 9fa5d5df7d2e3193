"""One progress bar for a whole run: every phase takes from one amount of work, so there is one estimate for all.

The unit of work is one token through one decoder layer. Other work is stated in it: a backward costs about two more, a
solver what its matrix products cost.
"""

import sys
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} so far, about {remaining} left"


class Progress:
    """A bar on stderr, or nothing where ``shown`` is false.

    Example::

        progress = Progress()
        progress.expect("calibrating", 16_384 * 32)
        progress.advance("calibrating", 512)
        progress.close()
    """

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self._expected: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._bar: Any = None

    def expect(self, phase: str, work: float) -> None:
        """Announce a phase's work. Again for the same phase: a better estimate replaces the old one."""
        self._expected[phase] = work
        self._show()

    def advance(self, phase: str, work: float) -> None:
        """Some of a phase's work is done."""
        if not self.shown:
            return
        done = self._done.get(phase, 0.0) + work
        # An estimate that was too low grows with the work, rather than holding the bar at its end.
        self._expected[phase] = max(self._expected.get(phase, 0.0), done)
        self._done[phase] = done
        self._show(phase)

    def finish(self, phase: str) -> None:
        """A phase is over, however much it was said to be."""
        self._done[phase] = self._expected[phase] = max(self._done.get(phase, 0.0), self._expected.get(phase, 0.0))
        self._show()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @property
    def fraction(self) -> float:
        """Work done of all that is expected, 0 … 1."""
        total = sum(self._expected.values())
        return sum(self._done.values()) / total if total else 0.0

    def _show(self, phase: str | None = None) -> None:
        if not self.shown:
            return
        if self._bar is None:
            self._bar = tqdm(total=0, file=sys.stderr, bar_format=FORMAT, dynamic_ncols=True, mininterval=0.5)
        self._bar.total = sum(self._expected.values())
        if phase is not None:
            self._bar.set_description_str(phase, refresh=False)
        self._bar.update(sum(self._done.values()) - self._bar.n)
