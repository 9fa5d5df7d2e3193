import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_prune.comparison.selection import agreement, kept_fraction, precision_rows
from lightning_prune.models.vocabulary import Block
from tests.comparison.fake_run import LAYERS, make_run

NAMES = ("layer", "block", "unit", "score", "kept")


def naive_spearman(left: list[float], right: list[float]) -> float:
    """Pearson correlation of mean ranks, written out."""

    def rank(values: list[float]) -> list[float]:
        return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]

    a, b = rank(left), rank(right)
    mean = (len(a) + 1) / 2
    covariance = math.fsum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = [math.sqrt(math.fsum((x - mean) ** 2 for x in values)) for values in (a, b)]
    return covariance / (spread[0] * spread[1])


@pytest.mark.parametrize("levels", [3, 1000])
def test_matrices_equal_loops_over_units_with_and_without_ties(tmp_path: Path, levels: int) -> None:
    runs = [make_run(tmp_path, f"run{seed}", 0.25 * (1 + seed % 2), seed=seed) for seed in range(4)]
    for run in runs:
        run.units.score[:] = np.floor(run.units.score * levels)
    rows = [sorted(zip(*(getattr(run.units, name).tolist() for name in NAMES), strict=True)) for run in runs]
    spearman, overlap = agreement(runs)
    for a, b in itertools.product(range(4), repeat=2):
        assert spearman[a, b] == pytest.approx(naive_spearman([r[3] for r in rows[a]], [r[3] for r in rows[b]]))
        kept = [{row[:3] for row in rows[side] if row[4]} for side in (a, b)]
        assert overlap[a, b] == pytest.approx(len(kept[0] & kept[1]) / len(kept[0] | kept[1]))


def test_other_units_are_not_compared_and_constant_scores_have_no_rank_correlation(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, f"run{seed}", 0.5, seed=seed) for seed in range(3)]
    runs[1].units.cost[:] = 20  # the same number of units at another cost: another model
    runs[2].units.score[:] = 1.0
    for matrix in agreement(runs):
        assert math.isnan(matrix[0, 1])
        assert matrix[0, 0] == pytest.approx(1.0)
    assert math.isnan(agreement(runs)[0][0, 2])


def test_kept_fraction_is_counted_by_layer_and_block(tmp_path: Path) -> None:
    groups, layers = make_run(tmp_path, "a", 0.5), make_run(tmp_path, "b", 0.5, whole_layers=True)
    units = groups.units
    for block, count in ((Block.ATTENTION, 2), (Block.MLP, 6)):
        found = kept_fraction(groups, block)
        for layer in range(LAYERS):
            rows = [i for i in range(len(units.layer)) if units.layer[i] == layer and units.block[i] == block]
            assert len(rows) == count
            assert found[layer] == pytest.approx(sum(not units.pruned[i] for i in rows) / count)
        assert kept_fraction(layers, block).tolist() == [float(kept) for kept in layers.units.kept]


def test_only_runs_that_differ_in_nothing_else_are_paired(tmp_path: Path) -> None:
    half = {"seed": 2, "environment": {"precision": "bf16-true"}}
    full, paired = make_run(tmp_path, seed=1), make_run(tmp_path, **half)
    others = [
        make_run(tmp_path, ratio=0.3, **half),
        make_run(tmp_path, weights="9" * 64, **half),
        make_run(tmp_path, calibration={"fingerprint": "8" * 64}, **half),
        make_run(tmp_path, "magnitude", **half),
        replace(make_run(tmp_path, **half), options={"round_to": 8}),
    ]
    (row,) = precision_rows([full, paired, *others])
    assert (row["folder"], row["folder_32_true"]) == (paired.folder, full.folder)
    kept = [{i for i, pruned in enumerate(run.units.pruned) if not pruned} for run in (full, paired)]
    assert (row["units"], row["decided_differently"]) == (len(full.units.pruned), len(kept[0] ^ kept[1]))
    assert row["jaccard_kept"] == pytest.approx(len(kept[0] & kept[1]) / len(kept[0] | kept[1]))
    assert (row["perplexity"], row["perplexity_32_true"]) == (12.5, 12.5)
