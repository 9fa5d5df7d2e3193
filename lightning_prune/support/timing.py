"""Wall-clock seconds by phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Seconds(dict[str, float]):
    """Phase → seconds spent in it, in the order in which phases began."""

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to ``phase``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - start)

    def add(self, phase: str, seconds: float) -> None:
        """Add seconds to ``phase``."""
        self[phase] = self.get(phase, 0.0) + seconds
