from pathlib import Path

import numpy as np
import pytest

from lightning_prune.comparison.distributions import REACH, relative, score_figure
from lightning_prune.comparison.maps import kept_figure, kept_fraction, matrix_figure
from lightning_prune.comparison.run import load_run
from lightning_prune.comparison.style import TIP
from tests.comparison.fake_run import LAYERS, write_run


def test_kept_fraction_is_counted_by_layer_and_block(tmp_path: Path) -> None:
    groups, layers = load_run(write_run(tmp_path, "a", 0.5)), load_run(write_run(tmp_path, "b", 0.5, whole_layers=True))
    units = groups.units
    for block, count in (("attention", 2), ("mlp", 6)):
        found = kept_fraction(units, block)
        for layer in range(LAYERS):
            mine = [not units.pruned[i] for i in range(len(units.layer)) if units.layer[i] == layer
                    and units.block[i] == block]  # fmt: skip
            assert len(mine) == count
            assert found[layer] == pytest.approx(sum(mine) / count)
        assert kept_fraction(layers.units, block).tolist() == [float(kept) for kept in layers.units.kept]
    cells = [patch.get_gid() for axes in kept_figure([groups, layers]).axes[:2] for patch in axes.artists]
    cells += [patch.get_gid() for axes in kept_figure([groups, layers]).axes[:2] for patch in axes.patches]
    assert len(set(cells)) == 2 * 2 * LAYERS  # blocks, runs, layers


def test_matrix_shows_every_pair_and_says_where_there_is_none() -> None:
    values = np.array([[1.0, np.nan], [np.nan, 1.0]])
    axes = matrix_figure(["a", "b"], values, "title", 0).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.00", "–", "–", "1.00"]
    assert axes.texts[1].get_gid() == f"{TIP}a and b: not comparable"


def test_every_unit_is_in_one_bar_and_scores_are_over_their_median(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, ratio=0.4))
    axes = score_figure([run]).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == len(run.units.score)
    pruned, kept = axes.containers
    assert sum(bar.get_height() for bar in pruned) == run.units.pruned.sum()
    assert sum(bar.get_height() for bar in kept) == run.units.kept.sum()
    assert np.median(relative(run)) == pytest.approx(0, abs=0.05)  # an even number of units
    units = run.units
    units.score[:] = 0.0
    assert relative(run).tolist() == [-REACH] * len(units.score)
