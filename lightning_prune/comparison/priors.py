"""Do two ways to measure depth priors order layers and blocks the same way? Spearman and Kendall between every two."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lightning_prune.comparison.agreement import Floats, spearman
from lightning_prune.comparison.run import Run
from lightning_prune.comparison.tables import Row

COLUMNS = ("prior", "other prior", "of", "Spearman", "Kendall")
TEXT = (
    "Rank correlation over the layers between depth priors that were measured in two ways on one model: 1 where both "
    "order them alike, 0 where they have nothing to do with one another. What either does to quality stands in the "
    "tables above."
)


@dataclass(frozen=True)
class Measured:
    """One measurement: how, on how many samples (None: all), by which system first, and per piece one number per layer,
    NaN where nothing was measured."""

    measure: str
    num_samples: int | None
    label: str
    delta: dict[str, Floats]

    @property
    def name(self) -> str:
        """As it stands in the table."""
        samples = "" if self.num_samples is None else f", {self.num_samples} samples"
        return f"{self.measure} ({self.label}{samples})"


def table(runs: Sequence[Run]) -> list[Row]:
    """A row per piece and pair of measurements that differ in how, or on how much, they were made."""
    found = []
    for (key, one), (other_key, other) in combinations(_measured(runs).items(), 2):
        if key[:2] != other_key[:2] or (one.measure, one.num_samples) == (other.measure, other.num_samples):
            continue
        pieces = [piece for piece in one.delta if len(one.delta[piece]) == len(other.delta.get(piece, ()))]
        for piece in pieces:
            left, right = one.delta[piece], other.delta[piece]
            values = (f"{spearman(left, right):.3f}", f"{kendall(left, right):.3f}")
            found.append((one.name, other.name, piece, *("–" if value == "nan" else value for value in values)))
    return found


def kendall(left: Floats, right: Floats) -> float:
    """Kendall's τ_b of two vectors ``[L]``: concordant less discordant pairs, over the pairs that are no ties. NaN when
    either is constant or holds a NaN."""
    signs = [np.sign(values[:, None] - values[None, :]) for values in (left, right)]
    untied = float(np.sqrt(np.square(signs[0]).sum() * np.square(signs[1]).sum()))
    return float((signs[0] * signs[1]).sum()) / untied if untied > 0 else float("nan")


def _measured(runs: Sequence[Run]) -> dict[tuple[str, str, str], Measured]:
    """Distinct measurements, the first of equal ones, by base model, calibration tokens and what was found."""
    found: dict[tuple[str, str, str], Measured] = {}
    for run in runs:
        prior = run.details.get("prior") or {}
        if run.recovery is not None or not prior.get("delta"):
            continue
        delta = {piece: np.array(values, dtype=np.float64) for piece, values in prior["delta"].items()}
        model = run.base_model_sha256 or run.base_model
        key = (model, str((run.calibration or {}).get("fingerprint")), repr(prior["delta"]))
        measure, samples = str(prior.get("measure", "?")), prior.get("num_samples")
        found.setdefault(key, Measured(measure, samples, run.label, delta))
    return found
