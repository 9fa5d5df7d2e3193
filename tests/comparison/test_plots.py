from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection

from lightning_prune.comparison.audit import Audit
from lightning_prune.comparison.plots import kept_figure, matrix_figure, plots, quality_figure
from lightning_prune.comparison.records import Run
from lightning_prune.comparison.repeats import repeats
from tests.comparison.fake_run import LAYERS, make_run, seeded


def quality(runs: list[Run]) -> Any:
    lines = repeats(runs)
    styles = {line.name: {"marker": "o"} for line in lines}
    return quality_figure(lines, "demo", "demo", styles, lambda line: line.first.achieved, "ratio").axes[0]


def test_every_run_is_a_mark_and_unusable_models_are_on_the_edge(tmp_path: Path) -> None:
    # Dense 10 and unigram 100: unusable from √1000, 31.6.
    values = {"a": 11.0, "b": 1e6, "c": None}
    axes = quality([make_run(tmp_path, name, 0.1 * n, perplexity=y) for n, (name, y) in enumerate(values.items(), 1)])
    marks = {bars.get_label(): bars.lines[0].get_xydata()[0].tolist() for bars in axes.containers}
    assert marks["a"] == [0.1, 11.0]
    assert marks["b"][1] == marks["c"][1] == pytest.approx(2 * 1000**0.5)
    assert any("unusable" in line.get_label() for line in axes.lines)


def test_repeated_seeds_are_one_mark_with_their_deviation(tmp_path: Path) -> None:
    axes = quality(seeded(tmp_path, {"wanda": [12.0, 13.0, 14.0]}))
    (bars,) = [found for found in axes.collections if isinstance(found, LineCollection)]
    assert bars.get_segments()[0][:, 1].tolist() == pytest.approx([12.0, 14.0])


def test_matrix_shows_every_pair_and_says_where_there_is_none() -> None:
    axes = matrix_figure(["a", "b"], np.array([[1.0, np.nan], [np.nan, 1.0]]), "title", 0).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.00", "–", "–", "1.00"]


def test_kept_map_has_a_row_per_run_and_a_column_per_layer(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name, whole_layers=name == "b") for name in "ab"]
    images = [axes.images[0].get_array() for axes in kept_figure(repeats(runs)).axes[:2]]
    assert [image.shape for image in images] == [(2, LAYERS)] * 2


def test_methods_that_remove_layers_are_left_out_of_the_agreement_of_units(result: Audit) -> None:
    tags = {plot.tag: plot.figure for plot in plots(result)}
    labels = [text.get_text() for text in tags["comparison 20 %/agreement/kept"].axes[0].get_yticklabels()]
    assert labels == ["magnitude", "hgsp_taylor", "wanda <b>&"]
    assert "comparison table 2 20 %/kept fraction" in tags
