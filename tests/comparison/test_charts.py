from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_prune.comparison.audit import Audit
from lightning_prune.comparison.charts import charts, kept_chart, matrix_chart, quality_chart
from lightning_prune.comparison.records import Run
from lightning_prune.comparison.repeats import repeats
from tests.comparison.fake_run import LAYERS, make_run, seeded


def quality(runs: list[Run]) -> Any:
    lines = repeats(runs)
    styles = {line.name: {"color": "#000000", "marker": "circle"} for line in lines}
    return quality_chart({line: line.achieved for line in lines}, "demo", "demo", styles, "ratio")


def marks(plot: Any) -> list[dict[str, Any]]:
    """The columns that the pointer reads, per system."""
    return [renderer.data_source.data for renderer in plot.hover[0].renderers]


def test_every_run_is_a_mark_and_unusable_models_are_on_the_edge(tmp_path: Path) -> None:
    # Dense 10 and unigram 100: unusable from √1000, 31.6.
    values = {"a": 11.0, "b": 1e6, "c": None}
    plot = quality([make_run(tmp_path, name, 0.1 * n, perplexity=y) for n, (name, y) in enumerate(values.items(), 1)])
    a, b, c = marks(plot)
    assert (a["x"], a["y"], a["perplexity"], a["verdict"]) == ([0.1], [11.0], ["11.000"], ["near dense"])
    assert b["y"][0] == c["y"][0] == pytest.approx(2 * 1000**0.5)
    assert (b["perplexity"], c["perplexity"]) == (["1.00e+06"], ["not finite"])
    legend = plot.legend[0]
    assert [item.label.value for item in legend.items] == ["a", "b", "c", "dense 10", "unusable from 31.62"]
    assert legend.click_policy == "hide"


def test_repeated_seeds_are_one_mark_with_their_deviation(tmp_path: Path) -> None:
    (wanda,) = marks(quality(seeded(tmp_path, {"wanda": [12.0, 13.0, 14.0]})))
    assert (wanda["y"], wanda["low"], wanda["high"]) == ([13.0], [12.0], [14.0])
    assert wanda["perplexity"] == ["13.000 ± 1.000"]


def test_matrix_shows_every_pair_and_says_where_there_is_none() -> None:
    (cells,) = marks(matrix_chart(["a", "b"], np.array([[1.0, np.nan], [np.nan, 1.0]]), 0))
    assert list(zip(cells["left"], cells["right"], cells["text"], strict=True)) == [
        ("a", "a", "1.00"),
        ("a", "b", "–"),
        ("b", "a", "–"),
        ("b", "b", "1.00"),
    ]


def test_kept_chart_has_a_point_per_block_and_layer(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    attention, mlp = marks(kept_chart(repeats([run])[0]))
    for block, points in (("attention", attention), ("mlp", mlp)):
        rows = [run.units.of(layer, block) for layer in range(LAYERS)]  # type: ignore[arg-type]
        assert points["kept"].tolist() == pytest.approx([run.units.kept[one].mean() for one in rows])


def test_methods_that_remove_layers_are_left_out_of_the_agreement_of_units(result: Audit) -> None:
    drawn = charts(result)
    assert drawn[0].heading == "Quality and size (Table 1)"
    assert len({chart.target for chart in drawn}) == len(drawn)
    (kept,) = [chart for chart in drawn if "Jaccard" in chart.caption and "20 % (Table 1)" in chart.heading]
    text = repr(kept.item)
    assert all(name in text for name in ("magnitude", "hgsp_taylor", "wanda <b>&"))
    assert "shortgpt" not in text
    assert "Kept by layer at 20 % (Table 2)" in {chart.heading for chart in drawn}
