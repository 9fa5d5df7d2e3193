"""What to trust, in three sentences made from the numbers: what is best, what it cost, and what noise may explain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prune.comparison.repeats import Spread
from lightning_prune.runs.verdict import DEGRADED, NEAR_DENSE, UNKNOWN, UNUSABLE

REPEAT = "--seeds 0 1 2"


@dataclass(frozen=True)
class Entry:
    """One system at one ratio, on the evaluation set the answer is about.

    Attributes:
        perplexity: one value per seed.
        verdict: the word for its mean.
        seconds: of calibrating and pruning, None where they are not known.
        draws: whether calibration samples were drawn, so that another seed could have given another result.
    """

    system: str
    ratio: float
    perplexity: Spread
    verdict: str
    seconds: float | None
    draws: bool = True


def answer(entries: Sequence[Entry], dense: float | None, on: str) -> list[str]:
    """Three sentences over runs that may be ranked together.

    Args:
        entries: in any order; with several at one ratio, each system once.
        dense: perplexity of the dense model; None where it is not finite.
        on: how the evaluation set is called.
    """
    if not entries:
        return ["Nothing here may be ranked: no run reached its ratio and was evaluated."]
    ratios = sorted({entry.ratio for entry in entries})
    fields = [[entry for entry in entries if entry.ratio == ratio] for ratio in ratios]
    return [_quality(fields, dense, on), _cost(fields), _noise(fields)]


def leaders(entries: Sequence[Entry]) -> list[Entry]:
    """The best usable systems of one ratio, best first: the lowest mean and what ties with it; [] where none is
    usable."""
    usable = [entry for entry in entries if entry.verdict != UNUSABLE and entry.perplexity.mean is not None]
    if not usable:
        return []
    usable.sort(key=_mean)
    return [entry for entry in usable if entry is usable[0] or tied(usable[0], entry)]


def tiers(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The usable systems of one ratio, best first; those of a tier tie with its first."""
    found: list[list[Entry]] = []
    rest = list(entries)
    while tier := leaders(rest):
        found.append(tier)
        rest = [entry for entry in rest if entry not in tier]
    return found


def tied(left: Entry, right: Entry) -> bool:
    """Whether the means are equal, or further apart by no more than the deviations of both together, √(a² + b²)."""
    return abs(_mean(left) - _mean(right)) <= spread(left, right)


def spread(left: Entry, right: Entry) -> float:
    """The standard deviation of the difference of two runs; what is not known counts as none."""
    return math.hypot(left.perplexity.deviation or 0.0, right.perplexity.deviation or 0.0)


def _quality(fields: Sequence[Sequence[Entry]], dense: float | None, on: str) -> str:
    systems = {entry.system for field in fields for entry in field}
    told: dict[str, list[str]] = {}  # ratios by what is said of them
    for field in fields:
        best, where = leaders(field), percent(field[0].ratio)
        if not best:
            told.setdefault("it is unusable" if len(systems) == 1 else "every system is unusable", []).append(where)
            continue
        if len(systems) == 1:
            says = "it was run"
        elif len(field) == 1:
            says = f"only {best[0].system} was run"
        elif len(best) > 1:
            says = f"{listed([entry.system for entry in best])} tie for the best"
        else:
            says = f"{best[0].system} is best"
        worth = "; ".join(_worth(entry, dense) for entry in best)
        told.setdefault(says, []).append(f"{where} ({worth})")
    known = f"dense {_number(dense)}" if dense is not None else "the dense perplexity is not finite"
    alone = f"there is only {next(iter(systems))} to judge: " if len(systems) == 1 else ""
    parts = [f"{says} at {listed(where)}" for says, where in told.items()]
    return f"By perplexity on {on} ({known}), {alone}{'; '.join(parts)}."


def _cost(fields: Sequence[Sequence[Entry]]) -> str:
    parts = []
    for field in fields:
        best = leaders(field)
        if not best:
            continue
        took = listed([f"{entry.system} {_seconds(entry.seconds)}" for entry in best])
        known = [entry for entry in field if entry.seconds is not None and entry.verdict != UNUSABLE]
        cheap = min(known, key=lambda entry: entry.seconds or 0.0, default=None)
        if cheap is None or cheap in best or len(field) == 1:
            parts.append(f"{took} at {percent(field[0].ratio)}")
        else:
            least = f"{cheap.system}, the cheapest that is usable, {_seconds(cheap.seconds)}"
            parts.append(f"{took} at {percent(field[0].ratio)} ({least}, for a perplexity of {_number(_mean(cheap))})")
    if not parts:
        return "What that cost does not matter: nothing is usable."
    return f"To calibrate and prune took {'; '.join(parts)}."


def _noise(fields: Sequence[Sequence[Entry]]) -> str:
    several = [entry for field in fields for entry in field if entry.perplexity.n > 1]
    if not several:
        if not any(entry.draws for field in fields for entry in field):
            return "No calibration samples were drawn, so there is no noise of theirs; other noise was not measured."
        return (
            f"Nothing was repeated, so nothing is known about noise: a small difference may be chance ({REPEAT} tells)."
        )
    counts = sorted({entry.perplexity.n for entry in several})
    over = f"Over {counts[0] if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'} calibration seeds"
    ties, rest, alone, lost = [], [], [], []
    for field in fields:
        found, where = tiers(field), percent(field[0].ratio)
        ties += [
            f"the order of {listed([one.system for one in tier])} at {where} is a tie ({_within(tier)})"
            for tier in found
            if len(tier) > 1
        ]
        if not found:
            lost.append(where)
        elif len(field) == 1:
            alone.append(f"{field[0].system} at {where} varies by {_deviation(field[0])}")
        elif len(found[0]) == 1:
            rest.append(where)
    parts = ties + alone
    if rest:
        parts.append(f"the lead at {listed(rest)} is larger than the spread")
    if lost:
        parts.append(f"at {listed(lost)} there is no usable system to compare")
    return f"{over}, {'; '.join(parts)}."


def _within(tier: Sequence[Entry]) -> str:
    far = max(_mean(entry) - _mean(tier[0]) for entry in tier[1:])
    within = max(spread(tier[0], entry) for entry in tier[1:])
    return f"differences up to {_small(far)}, spread {_small(within)}"


def _worth(entry: Entry, dense: float | None) -> str:
    text = _number(_mean(entry))
    if entry.perplexity.deviation is not None:
        text += f" ± {_small(entry.perplexity.deviation)}"
    if dense is not None:
        text += f", {_mean(entry) / dense:.2f} × dense"
    # The words for what is no more than expected would be noise of another kind.
    return text if entry.verdict in (NEAR_DENSE, DEGRADED, UNKNOWN) else f"{text}, {entry.verdict}"


def _mean(entry: Entry) -> float:
    mean = entry.perplexity.mean
    return math.inf if mean is None else mean


def _deviation(entry: Entry) -> str:
    deviation = entry.perplexity.deviation
    return "an amount that is not known" if deviation is None else f"± {_small(deviation)}"


def percent(ratio: float) -> str:
    """A ratio in words: ``20 %``."""
    return f"{ratio * 100:.4g} %"


def _seconds(value: float | None) -> str:
    return "(seconds not recorded)" if value is None else f"{value:.1f} s"


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def _small(value: float) -> str:
    """A difference or deviation, with its first digits however small it is."""
    return "0" if value == 0 else f"{value:.3f}" if value >= 0.0095 else f"{value:.1g}"


def listed(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
