"""Do two methods rank the same way and keep the same things? Spearman and Jaccard between every two runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_prune.comparison.run import Run
from lightning_prune.comparison.tables import display_names
from lightning_prune.runs.score_table import ScoreTable

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Symmetric matrices ``[R, R]`` between R runs of one ratio; NaN where two runs cannot be compared.

    At the level of units (GQA groups and MLP channels) ``spearman`` compares scores and ``jaccard`` the sets of
    kept units; at the level of layers, where ShortGPT can be compared too, both read the kept parameters per layer.
    """

    labels: list[str]
    spearman: Floats
    jaccard: Floats


def ranks(values: Floats) -> Floats:
    """1-based ranks ``[U]``, ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def spearman(left: Floats, right: Floats) -> float:
    """Rank correlation of two vectors ``[U]``; NaN when either is constant or holds a NaN."""
    if np.isnan(left).any() or np.isnan(right).any():
        return float("nan")
    a, b = ranks(left), ranks(right)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else float("nan")


def jaccard(left: Floats, right: Floats) -> float:
    """Σ min / Σ max of two non-negative vectors; for 0/1 vectors |A ∩ B| / |A ∪ B|. NaN when both are zero."""
    union = float(np.maximum(left, right).sum())
    return float(np.minimum(left, right).sum()) / union if union > 0 else float("nan")


def unit_agreement(runs: Sequence[Run]) -> Agreement:
    """Between runs that rank the same GQA groups and MLP channels; others are left out."""
    names = display_names(runs)
    tables = {names[id(run)]: run.units for run in runs if not run.units.whole_layers}
    return Agreement(
        list(tables),
        _matrix(list(tables.values()), lambda a, b: spearman(_ordered(a, a.score), _ordered(b, b.score))),
        _matrix(list(tables.values()), lambda a, b: jaccard(_ordered(a, a.kept), _ordered(b, b.kept))),
    )


def layer_agreement(runs: Sequence[Run]) -> Agreement:
    """Between all runs, from the parameters that every layer keeps."""
    names = display_names(runs)
    tables = {names[id(run)]: run.units for run in runs}

    def kept(table: ScoreTable) -> Floats:
        # As shares of the layer: a method that removes whole layers also counts norms as cost.
        return table.per_layer(table.cost * table.kept) / table.per_layer(table.cost)

    def same_depth(measure: Callable[[Floats, Floats], float]) -> Callable[[ScoreTable, ScoreTable], float]:
        return lambda a, b: measure(kept(a), kept(b)) if a.num_layers == b.num_layers else float("nan")

    columns = list(tables.values())
    return Agreement(list(tables), _matrix(columns, same_depth(spearman)), _matrix(columns, same_depth(jaccard)))


def chance_jaccard(runs: Sequence[Run]) -> float:
    """Overlap that two random kept sets of the runs' mean size would have, k / (2 − k) for a kept share k."""
    share = float(np.mean([run.units.kept.mean() for run in runs if not run.units.whole_layers]))
    return share / (2 - share)


def _ordered(table: ScoreTable, values: NDArray[np.generic]) -> Floats:
    return values[np.lexsort((table.unit, table.block, table.layer))].astype(np.float64)


def _matrix(tables: list[ScoreTable], measure: Callable[[ScoreTable, ScoreTable], float]) -> Floats:
    count = len(tables)
    found = np.full((count, count), np.nan)
    for row in range(count):
        for column in range(row + 1):
            if _same_units(tables[row], tables[column]):
                found[row, column] = found[column, row] = measure(tables[row], tables[column])
    return found


def _same_units(left: ScoreTable, right: ScoreTable) -> bool:
    if left.whole_layers or right.whole_layers:
        return True  # compared by layer only
    return left.layer.shape == right.layer.shape and all(
        bool((_ordered(left, getattr(left, name)) == _ordered(right, getattr(right, name))).all())
        for name in ("layer", "unit", "cost")
    )
