"""Runs that differ in nothing but the seed of their calibration samples, as one line with mean and deviation."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_prune.comparison import costs
from lightning_prune.comparison.run import Run
from lightning_prune.runs.verdict import verdict_word

NOT_OF_THE_DECISION = ("pretrained", "label", "onload")  # options that change no result


@dataclass(frozen=True)
class Spread:
    """Values of the same thing, one per seed; ``None`` stands for one that is not finite."""

    values: tuple[float | None, ...]

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """Arithmetic mean; None where one of them is not finite."""
        known = self._finite
        return None if known is None else statistics.fmean(known)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n − 1); None for a single value, and where one is not finite."""
        known = self._finite
        return None if known is None or len(known) < 2 else statistics.stdev(known)

    @property
    def _finite(self) -> list[float] | None:
        known = [value for value in self.values if value is not None and math.isfinite(value)]
        return known if known and len(known) == len(self.values) else None


@dataclass(frozen=True)
class Repeats:
    """One system at one ratio: its runs by seed, ascending. Without repetitions there is one."""

    runs: list[Run]

    @property
    def first(self) -> Run:
        """The run of the lowest seed, which stands for the others in everything that has no mean."""
        return self.runs[0]

    @property
    def sets(self) -> list[str]:
        """Evaluation sets that all runs have."""
        return [name for name in self.first.sets if all(name in run.sets for run in self.runs)]

    def perplexity(self, name: str) -> Spread:
        """Of the pruned models, on one evaluation set."""
        return Spread(tuple(run.perplexity(name) for run in self.runs))

    def verdict(self, name: str) -> str:
        """The word for the mean perplexity."""
        first = self.first
        return verdict_word(self.perplexity(name).mean, first.perplexity(name, "dense"), first.unigram_perplexity(name))

    def average(self, read: Callable[[Run], float | None]) -> float | None:
        """The mean of what is known; None where nothing is."""
        known = [value for run in self.runs if (value := read(run)) is not None]
        return statistics.fmean(known) if known else None

    @property
    def seconds(self) -> float | None:
        """Calibrating and pruning, a reused calibration in full; None where a calibration is not recorded."""
        return self.average(to_prune)

    @property
    def mean_run(self) -> Run:
        """For plots: the first run with the mean perplexities and their deviations."""
        if len(self.runs) == 1:
            return self.first
        found = dict(self.first.metrics["perplexity"])
        for name in self.sets:
            values = self.perplexity(name)
            found[name] = found[name] | {"pruned": values.mean, "deviation": values.deviation}
        return replace(self.first, metrics=self.first.metrics | {"perplexity": found})


def seed(run: Run) -> int | None:
    """What drew the calibration samples; None where nothing was drawn."""
    found = None if run.calibration is None else run.calibration.get("seed")
    return None if found is None else int(found)


def seeds(runs: Sequence[Run]) -> list[int]:
    """All of them, ascending."""
    return sorted({found for run in runs if (found := seed(run)) is not None})


def repeats(runs: Sequence[Run]) -> list[Repeats]:
    """``runs``, which must be of one group of the audit, by system and ratio, in order of appearance.

    Two runs of the same seed repeat nothing, so each starts a line of its own.
    """
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        options = sorted((name, repr(value)) for name, value in run.options.items() if name not in NOT_OF_THE_DECISION)
        parent = None if run.recovery is None else str(run.recovery.get("parent_label"))
        key = (run.label, run.requested, run.method, tuple(options), parent)
        copy = 0
        while any(seed(other) == seed(run) for other in found.get((*key, copy), [])):
            copy += 1
        found.setdefault((*key, copy), []).append(run)
    return [Repeats(sorted(members, key=lambda run: seed(run) or 0)) for members in found.values()]


def to_prune(run: Run) -> float | None:
    """Seconds of calibrating and pruning; a calibration that another run made counts as this run's, too. None where it
    is not known what calibrating took."""
    calibration = costs.calibration(run)
    if calibration is None and run.calibration is not None:
        return None
    return (calibration or 0.0) + (costs.pruning(run) or 0.0)
