"""Do two methods rank the same way and keep the same things? Spearman and Jaccard between every two runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_prune.checkpoint.scores import Scores
from lightning_prune.comparison.run import Run
from lightning_prune.comparison.tables import display_names

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
    return float(_standard_ranks(left) @ _standard_ranks(right))


def jaccard(left: NDArray[Any], right: NDArray[Any]) -> float:
    """Σ min / Σ max of two non-negative vectors; for 0/1 vectors |A ∩ B| / |A ∪ B|. NaN when both are zero."""
    union = float(np.maximum(left, right).sum())
    return float(np.minimum(left, right).sum()) / union if union > 0 else float("nan")


def unit_agreement(runs: Sequence[Run]) -> Agreement:
    """Between runs that rank the same GQA groups and MLP channels; others are left out."""
    names = display_names(runs)
    found = {names[id(run)]: _units(run.units) for run in runs if not run.units.whole_layers}
    columns = list(found.values())
    return Agreement(
        list(found),
        _matrix(columns, lambda a, b: float(a.ranks @ b.ranks)),
        _matrix(columns, lambda a, b: jaccard(a.kept, b.kept)),
    )


def layer_agreement(runs: Sequence[Run]) -> Agreement:
    """Between all runs, from the parameters that every layer keeps."""
    names = display_names(runs)
    found = {names[id(run)]: _layers(run.units) for run in runs}
    columns = list(found.values())
    return Agreement(
        list(found),
        _matrix(columns, lambda a, b: float(a.ranks @ b.ranks)),
        _matrix(columns, lambda a, b: jaccard(a.kept, b.kept)),
    )


def chance_jaccard(runs: Sequence[Run]) -> float:
    """Overlap that two random kept sets of the runs' mean size would have, k / (2 − k) for a kept share k."""
    share = float(np.mean([run.units.kept.mean() for run in runs if not run.units.whole_layers]))
    return share / (2 - share)


@dataclass(frozen=True)
class _Column:
    """What one run contributes, in an order that does not depend on its file; made once, compared R times.

    ``ranks`` and ``kept`` are of U units or of L layers. ``key`` and ``cost`` say which units the run ranks; they are
    empty for whole layers, which are compared with anything of the same depth.
    """

    ranks: Floats
    kept: NDArray[Any]
    key: NDArray[np.int64]
    cost: NDArray[np.int64]


def _units(table: Scores) -> _Column:
    return _Column(_standard_ranks(table.score), table.kept, _key(table), table.cost)


def _layers(table: Scores) -> _Column:
    # As shares of the layer: a method that removes whole layers also counts norms as cost.
    kept = table.per_layer(table.cost * table.kept) / table.per_layer(table.cost)
    if table.whole_layers:
        nothing = np.empty(0, np.int64)
        return _Column(_standard_ranks(kept), kept, nothing, nothing)
    return _Column(_standard_ranks(kept), kept, _key(table), table.cost)


def _key(table: Scores) -> NDArray[np.int64]:
    """Which units the rows are; a table that was read is sorted by them."""
    return np.stack([table.layer, table.code, table.unit])


def _standard_ranks(values: Floats) -> Floats:
    """Ranks with mean 0 and length 1, NaN where there is nothing to rank; their product is Spearman's coefficient."""
    if np.isnan(values).any():
        return np.full(len(values), np.nan)
    centred = ranks(values)
    centred -= centred.mean()
    length = float(np.sqrt(centred @ centred))
    return centred / length if length > 0 else np.full(len(values), np.nan)


def _matrix(columns: list[_Column], measure: Callable[[_Column, _Column], float]) -> Floats:
    count = len(columns)
    found = np.full((count, count), np.nan)
    for row in range(count):
        for column in range(row + 1):
            if _comparable(columns[row], columns[column]):
                found[row, column] = found[column, row] = measure(columns[row], columns[column])
    return found


def _comparable(left: _Column, right: _Column) -> bool:
    if left.kept.shape != right.kept.shape:
        return False
    if not left.key.size or not right.key.size:
        return True  # whole layers
    return np.array_equal(left.key, right.key) and np.array_equal(left.cost, right.cost)
