"""Depth priors measured in two ways stand beside each other with their rank agreement."""

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.priors import kendall, table
from lightning_prune.comparison.run import Run, load_run
from lightning_prune.comparison.sections import sections
from tests.comparison.fake_run import write_run

REMOVAL = {"layer": [0.4, 0.1, 0.2, 0.3], "attention": [0.4, 0.3, 0.2, 0.1], "mlp": [0.1, 0.2, 0.3, 0.4]}
GRADIENT = {"layer": [0.9, 0.2, 0.1, 0.3], "attention": [1.0, 2.0, 3.0, 4.0], "mlp": [0.0, 0.1, 0.2, 0.9]}


def run(root: Path, label: str, measure: str, delta: Any, **facts: Any) -> Run:
    folder = write_run(root, label, **facts)
    details = json.loads((folder / "method.json").read_text())
    details["prior"] = {"measure": measure, "num_samples": None, "delta": delta}
    (folder / "method.json").write_text(json.dumps(details))
    return load_run(folder)


def naive_kendall(left: list[float], right: list[float]) -> float:
    """τ_b by its definition, pair by pair."""
    concordant = discordant = ties_left = ties_right = 0
    for i, j in combinations(range(len(left)), 2):
        a, b = left[i] - left[j], right[i] - right[j]
        ties_left += a == 0
        ties_right += b == 0
        concordant += a * b > 0
        discordant += a * b < 0
    pairs = len(left) * (len(left) - 1) // 2
    return (concordant - discordant) / math.sqrt((pairs - ties_left) * (pairs - ties_right))


@pytest.mark.parametrize("levels", [3, 1000])
def test_kendall_with_and_without_ties_matches_the_definition(levels: int) -> None:
    random = np.random.default_rng(1)
    left, right = (random.integers(0, levels, 30).astype(float) for _ in range(2))
    assert kendall(left, right) == pytest.approx(naive_kendall(left.tolist(), right.tolist()), abs=1e-12)
    assert math.isnan(kendall(np.ones(3), np.arange(3.0)))
    assert math.isnan(kendall(np.array([1.0, float("nan"), 2.0]), np.arange(3.0)))


def test_two_measures_are_compared_once_whatever_the_ratios(tmp_path: Path) -> None:
    runs = [
        run(tmp_path, "removed", "removal", REMOVAL, ratio=0.2),
        run(tmp_path, "removed", "removal", REMOVAL, ratio=0.5, version=1),
        run(tmp_path, "guessed", "gradient", GRADIENT, ratio=0.2),
        load_run(write_run(tmp_path, "wanda")),
    ]
    first = ("removal (removed)", "gradient (guessed)")
    assert table(runs) == [
        (*first, "layer", "0.800", "0.667"),
        (*first, "attention", "-1.000", "-1.000"),
        (*first, "mlp", "1.000", "1.000"),
    ]
    (shown,) = [one for one in sections(audit(runs), []) if one.heading == "Depth priors"]
    assert list(shown.tables[0][2]) == table(runs)


def test_what_was_not_measured_or_not_on_the_same_tokens_is_not_compared(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("attention", "mlp"), [None] * 4)
    by_layer = run(tmp_path, "by-layer", "removal", REMOVAL | nothing)
    gradient = run(tmp_path, "gradient", "gradient", GRADIENT)
    assert [row[3] for row in table([by_layer, gradient])] == ["0.800", "–", "–"]
    elsewhere = run(tmp_path, "elsewhere", "gradient", GRADIENT, calibration={"fingerprint": "9" * 64})
    assert table([by_layer, elsewhere]) == []
    assert table([gradient, elsewhere]) == []
    assert not [one for one in sections(audit([gradient]), []) if one.heading == "Depth priors"]
