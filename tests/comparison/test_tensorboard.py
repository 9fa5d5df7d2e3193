from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from lightning_prune.comparison.audit import Audit


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def layout(report: Path) -> Layout:
    found = Layout()
    found.ParseFromString(
        read(report / "tensorboard").Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    return found


def test_figures_of_the_comparison_come_before_those_of_runs(report: Path) -> None:
    events = read(report / "tensorboard")
    tags = events.Tags()["images"]
    assert {"comparison/perplexity and size/demo", "comparison 20 %/agreement/kept"} <= set(tags)
    assert events.Images("comparison/perplexity and seconds/demo")[0].encoded_image_string.startswith(b"\x89PNG")


def test_every_system_is_a_run_and_its_tags_name_the_ratio(report: Path, result: Audit) -> None:
    folders = {path.name for path in (report / "tensorboard").iterdir() if path.is_dir()}
    assert folders == {"magnitude", "hgsp_taylor", "shortgpt", "shortgpt_512 table 2", "wanda _b_"}
    events = read(report / "tensorboard" / "hgsp_taylor")
    run = next(run for run in result.groups[0].runs if (run.label, run.requested) == ("hgsp_taylor", 0.5))
    points = events.Scalars("comparison 50 %/share of importance")
    shares = [sum(run.units.importance[run.units.layer == layer]) / sum(run.units.importance) for layer in range(4)]
    assert [point.step for point in points] == [0, 1, 2, 3]
    assert [point.value for point in points] == pytest.approx(shares, rel=1e-5)
    assert {tag.split("/")[0] for tag in events.Tags()["scalars"]} == {"comparison 20 %", "comparison 50 %"}


def test_layout_has_a_category_per_ratio_whose_charts_are_not_smoothed(report: Path) -> None:
    categories = layout(report).category
    assert [category.title for category in categories] == [
        "comparison 20 %",
        "comparison 50 %",
        "comparison table 2 20 %",
    ]
    written = set(read(report / "tensorboard" / "hgsp_taylor").Tags()["scalars"])
    for category in categories[:2]:
        series = [series for chart in category.chart for series in chart.margin.series]
        assert len(series) == len(category.chart) == 3
        assert all(one.value == one.lower == one.upper for one in series)  # a margin of width 0
        assert {one.value for one in series} <= written
        assert all(one.value.startswith(f"{category.title}/") for one in series)
