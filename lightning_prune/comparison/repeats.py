"""Runs that differ in nothing but the seed of their calibration samples, as one line with mean and deviation."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from lightning_prune.comparison.records import Run
from lightning_prune.methods.target import SIZES

NOT_OF_THE_DECISION = ("pretrained", "label", "onload")  # options that change no result


class Spread(NamedTuple):
    """Arithmetic mean and sample standard deviation (n − 1) over seeds; None where a value is not finite, or there is
    only one to deviate."""

    mean: float | None = None
    deviation: float | None = None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread":
        """Mean and deviation of ``values``; both None unless every value is finite."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known or len(known) < len(values):
            return cls()
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True, eq=False)
class Repeats:
    """One system at one size: its runs by seed, ascending. Without repetitions there is one."""

    name: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        """The run of the lowest seed, which represents the others in everything that has no mean."""
        return self.runs[0]

    @property
    def size(self) -> str:
        """The requested size, which all runs share."""
        return self.first.size

    @property
    def sets(self) -> list[str]:
        """Evaluation sets that all runs have."""
        return [name for name in self.first.sets if all(name in run.sets for run in self.runs)]

    @property
    def achieved(self) -> float:
        """Mean of the pruning ratios that the runs reached."""
        return statistics.fmean(run.achieved for run in self.runs)

    def perplexity(self, name: str) -> Spread:
        """Mean and deviation of perplexity on one evaluation set."""
        return Spread.of([run.perplexity(name) for run in self.runs])

    def distance(self, name: str, key: str) -> Spread:
        """Mean and deviation of one of the ``DistanceFacts``."""
        facts = [run.metrics.distance.get(name) for run in self.runs]
        return Spread.of([None if one is None else getattr(one, key) for one in facts])

    def shown_distance(self, name: str, key: str) -> str:
        """A distance as a table cell: shares in percent, and a dash where a run lacks it."""
        if any(name not in run.metrics.distance for run in self.runs):
            return "–"
        mean, deviation = self.distance(name, key)
        if mean is None:
            return "not finite"
        known = [mean] if deviation is None else [mean, deviation]
        return " ± ".join(f"{one:.4f}" if key == "kl_divergence" else f"{100 * one:.1f} %" for one in known)

    def verdict(self, name: str) -> str:
        """The word for the mean perplexity and divergence on one evaluation set."""
        divergences = [run.divergence(name) for run in self.runs]
        known = [one for one in divergences if one is not None]
        divergence = statistics.fmean(known) if len(known) == len(divergences) else None
        return self.first.verdict(name, self.perplexity(name).mean, divergence)

    def shown_verdict(self, name: str) -> str:
        """The verdict, and whether the KL divergence decided it."""
        word = self.verdict(name)
        return word if word == self.first.verdict(name, self.perplexity(name).mean, None) else f"{word} (KL)"

    def average(self, read: Callable[[Run], float | None]) -> float | None:
        """The mean of the values that are known; None where none is."""
        known = [value for run in self.runs if (value := read(run)) is not None]
        return statistics.fmean(known) if known else None


def decision(run: Run) -> list[tuple[str, str]]:
    """The options on which a run's result depends."""
    options = run.options if run.metrics.target is None else run.options | dict.fromkeys(SIZES, run.target)
    return sorted((name, repr(value)) for name, value in options.items() if name not in NOT_OF_THE_DECISION)


def repeats(runs: Sequence[Run]) -> list[Repeats]:
    """``runs``, which must be of one group of the audit, by system and size, in order of appearance.

    Two runs of the same seed repeat nothing, so each starts a line of its own. A line is called by its label, with
    the run folder where a label comes twice at one size.
    """
    lines: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        parent = None if run.recovery is None else run.recovery.parent_label
        key = (run.label, run.size, run.metrics.method.name, tuple(decision(run)), parent)
        copy = 0
        while any(other.seed == run.seed for other in lines.get((*key, copy), [])):
            copy += 1
        lines.setdefault((*key, copy), []).append(run)
    members = [sorted(line, key=lambda run: run.seed or 0) for line in lines.values()]
    counts = Counter((line[0].label, line[0].size) for line in members)
    names = [f"{one.label}/{one.folder.name}" if counts[one.label, one.size] > 1 else one.label for one, *_ in members]
    return [Repeats(name, line) for name, line in zip(names, members, strict=True)]


def by_size(lines: Sequence[Repeats]) -> dict[str, list[Repeats]]:
    """Lines by what was requested, the smallest ratio first."""
    sizes: dict[str, list[Repeats]] = {}
    for line in sorted(lines, key=lambda line: line.first.requested):
        sizes.setdefault(line.size, []).append(line)
    return sizes


def in_order(lines: Sequence[Repeats]) -> list[Repeats]:
    """Lines of one size together, the smallest ratio first."""
    return list(chain.from_iterable(by_size(lines).values()))


def percent(size: str) -> str:
    """A ratio in percent, a target as it is."""
    return size if size[-1].isalpha() else f"{float(size) * 100:g} %"
