import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest

from lightning_prune.comparison.agreement import jaccard, layer_agreement, spearman, unit_agreement
from lightning_prune.comparison.run import load_run
from tests.comparison.fake_run import write_run

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
def test_spearman_with_and_without_ties_matches_the_definition(levels: int) -> None:
    random = np.random.default_rng(0)
    left, right = (random.integers(0, levels, 50).astype(float) for _ in range(2))
    assert spearman(left, right) == pytest.approx(naive_spearman(left.tolist(), right.tolist()), abs=1e-12)
    assert spearman(left, np.exp(left / 100)) == pytest.approx(1.0)
    assert spearman(left, -left) == pytest.approx(-1.0)


def test_constant_or_broken_scores_have_no_rank_correlation() -> None:
    assert math.isnan(spearman(np.ones(4), np.arange(4.0)))
    assert math.isnan(spearman(np.array([1.0, float("nan")]), np.arange(2.0)))


def test_jaccard_of_sets_and_of_amounts() -> None:
    assert jaccard(np.array([1.0, 1, 0, 0]), np.array([1.0, 0, 1, 0])) == pytest.approx(1 / 3)
    assert jaccard(np.array([2.0, 4.0]), np.array([1.0, 6.0])) == pytest.approx((1 + 4) / (2 + 6))
    assert math.isnan(jaccard(np.zeros(2), np.zeros(2)))


def test_methods_that_remove_layers_are_compared_by_layer_only(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, "wanda", 0.5, seed=1),
        write_run(tmp_path, "taylor", 0.5, seed=2),
        write_run(tmp_path, "shortgpt", 0.5, whole_layers=True, seed=3),
    ]
    runs = [load_run(folder) for folder in folders]
    assert unit_agreement(runs).labels == ["wanda", "taylor"]
    layers = layer_agreement(runs)
    assert layers.labels == ["wanda", "taylor", "shortgpt"]
    kept = [
        [float(run.units.kept[run.units.layer == layer].mean()) for layer in range(run.units.num_layers)]
        for run in runs
    ]
    low = sum(min(a, b) for a, b in zip(kept[0], kept[2], strict=True))
    high = sum(max(a, b) for a, b in zip(kept[0], kept[2], strict=True))
    assert layers.jaccard[0, 2] == pytest.approx(low / high)
    assert np.array_equal(layers.spearman, layers.spearman.T, equal_nan=True)


def test_order_of_rows_in_the_file_does_not_matter(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, "wanda", 0.5, seed=1), write_run(tmp_path, "same", 0.5, seed=1)]
    lines = (folders[1] / "scores.csv").read_text().splitlines()
    (folders[1] / "scores.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    found = unit_agreement([load_run(folder) for folder in folders])
    assert found.spearman[0, 1] == pytest.approx(1.0)
    assert found.jaccard[0, 1] == 1.0


def test_runs_with_other_units_are_not_compared(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, "wanda", 0.5, seed=1), write_run(tmp_path, "other", 0.5, seed=2)]
    scores = folders[1] / "scores.csv"
    # The same number of units at another cost: another model.
    scores.write_text(re.sub(r",10,1\.0,", ",20,1.0,", scores.read_text()))
    runs = [load_run(folder) for folder in folders]
    for found in (unit_agreement(runs), layer_agreement(runs)):
        assert math.isnan(found.spearman[0, 1])
        assert math.isnan(found.jaccard[0, 1])
        assert found.jaccard[0, 0] == 1.0


def test_matrices_equal_loops_over_units_and_layers(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path, f"run{seed}", 0.25 * (1 + seed % 2), seed=seed)) for seed in range(4)]
    rows = [sorted(zip(*(getattr(run.units, name).tolist() for name in NAMES), strict=True)) for run in runs]
    units, layers = unit_agreement(runs), layer_agreement(runs)
    for a, b in itertools.product(range(4), repeat=2):
        left, right = rows[a], rows[b]
        assert units.spearman[a, b] == pytest.approx(naive_spearman([r[3] for r in left], [r[3] for r in right]))
        kept = [{row[:3] for row in side if row[4]} for side in (left, right)]
        assert units.jaccard[a, b] == pytest.approx(len(kept[0] & kept[1]) / len(kept[0] | kept[1]))
        shares = [[sum(row[4] for row in side if row[0] == at) / 8 for at in range(4)] for side in (left, right)]
        low, high = (sum(f(x, y) for x, y in zip(*shares, strict=True)) for f in (min, max))
        assert layers.jaccard[a, b] == pytest.approx(low / high)
        if all(len(set(share)) > 1 for share in shares):
            assert layers.spearman[a, b] == pytest.approx(naive_spearman(*shares))
