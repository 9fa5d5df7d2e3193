"""What runs keep, by layer and unit, and how far they agree. Only this module reads score tables."""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from numpy.typing import NDArray

from lightning_prune.comparison.records import Run
from lightning_prune.models.vocabulary import Block

Floats = NDArray[np.float64]
BLOCKS = (Block.ATTENTION, Block.MLP)


def removes_layers(run: Run) -> bool:
    """Whether the units are whole decoder layers."""
    return run.units.whole_layers


def largest_unit(run: Run) -> float:
    """The share of all parameters that the largest unit is."""
    return float(run.units.cost.max()) / run.metrics.parameters.dense


def kept_fraction(run: Run, block: Block) -> Floats:
    """Share of a block's units that are kept ``[L]``; a layer unit counts as both blocks. NaN where there are none."""
    table = run.units
    rows = None if table.whole_layers else block
    count = table.per_layer(np.ones(len(table.layer)), rows)
    kept = table.per_layer(table.kept.astype(np.float64), rows)
    return np.divide(kept, count, out=np.full_like(kept, np.nan), where=count > 0)


def importance_share(run: Run) -> Floats:
    """Each layer's share of the model's whole importance ``[L]``; zeros where there is none."""
    return run.units.per_layer(run.units.importance) / (run.units.importance.sum() or 1.0)


def changed_units(run: Run, other: Run) -> tuple[int, int, float] | None:
    """How many units two runs decide differently, of how many, and the Jaccard index of the kept ones; None where they
    do not have the same units."""
    left, right = run.units.kept, other.units.kept
    return None if len(left) != len(right) else (int(np.sum(left != right)), len(left), jaccard(left, right))


def agreement(runs: Sequence[Run]) -> tuple[Floats, Floats]:
    """Spearman's rank correlation of scores and the Jaccard index of kept units between every two of R runs ``[R, R]``;
    NaN where two do not rank the same units."""
    ranks = [_standard_ranks(run.units.score) for run in runs]
    spearman, overlap = (np.full((len(runs), len(runs)), np.nan) for _ in range(2))
    for row, column in itertools.combinations_with_replacement(range(len(runs)), 2):
        left, right = runs[row].units, runs[column].units
        if all(
            np.array_equal(getattr(left, name), getattr(right, name)) for name in ("layer", "block", "unit", "cost")
        ):
            spearman[row, column] = spearman[column, row] = float(ranks[row] @ ranks[column])
            overlap[row, column] = overlap[column, row] = jaccard(left.kept, right.kept)
    return spearman, overlap


def jaccard(left: NDArray[np.bool_], right: NDArray[np.bool_]) -> float:
    """|A ∩ B| / |A ∪ B| of two sets ``[U]``; NaN when both are empty."""
    union = int((left | right).sum())
    return int((left & right).sum()) / union if union else float("nan")


def _standard_ranks(values: Floats) -> Floats:
    """Ranks with mean 0 and length 1, NaN where all are equal; their product is Spearman's coefficient."""
    ranks: Floats = pd.Series(values).rank().to_numpy(dtype=np.float64)
    ranks = ranks - ranks.mean()
    length = float(np.linalg.norm(ranks))
    return ranks / length if length > 0 else np.full_like(ranks, np.nan)
