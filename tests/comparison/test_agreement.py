import math
from pathlib import Path

import numpy as np
import pytest

from lightning_prune.comparison.agreement import jaccard, layer_agreement, spearman, unit_agreement
from lightning_prune.comparison.run import load_run
from tests.comparison.fake_run import write_run


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
