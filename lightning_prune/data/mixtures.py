"""Several texts in one calibration set: ``[a.jsonl:0.7, b.txt:0.3]``, shares of samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prune.support.errors import UserError


@dataclass(frozen=True)
class Part:
    """A text as ``--data.dataset`` takes it, perhaps with a split, and its share of the samples."""

    spec: str
    share: float

    def __str__(self) -> str:
        return f"{self.spec}:{self.share:g}"


def parse(specs: Sequence[str]) -> list[Part]:
    """Parts from ``name:share`` or ``name:split:share``.

    Raises:
        UserError: a share is missing, not a positive number, or they do not sum to 1; a text is named twice.
    """
    parts = []
    for spec in specs:
        name, _, share = spec.rpartition(":")
        try:
            parts.append(Part(name, float(share)))
        except ValueError:
            parts.append(Part(spec, math.nan))
    total = sum(part.share for part in parts)
    missing = not all(part.spec and part.share > 0 for part in parts)
    if missing or abs(total - 1) > 1e-3:
        problem = "one is missing or not above 0" if missing else f"they sum to {total:g}"
        raise UserError(
            f"--data.dataset [{', '.join(specs)}]: every text of a mixture needs its share of the samples, and the "
            f"shares must sum to 1 ({problem}). For example: "
            f"[{', '.join(f'{part.spec}:{1 / len(parts):.3g}' for part in parts)}]."
        )
    if len({part.spec for part in parts}) < len(parts):
        raise UserError(f"--data.dataset [{', '.join(specs)}] names a text twice. Give it the sum of its shares.")
    return parts


def counts(parts: Sequence[Part], num_samples: int) -> list[int]:
    """Samples of every part: their shares by largest remainder, the earlier part first where remainders are equal;
    UserError where a part gets none."""
    exact = [round(part.share * num_samples, 9) for part in parts]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(parts)), key=lambda number: counts[number] - exact[number])
    for number in order[: num_samples - sum(counts)]:
        counts[number] += 1
    if 0 in counts:
        raise UserError(
            f"--data.dataset: of {num_samples} samples none would be from {parts[counts.index(0)]}. Raise its share or "
            "--data.num_samples."
        )
    return counts
