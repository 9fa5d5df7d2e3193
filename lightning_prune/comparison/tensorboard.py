"""The comparison in TensorBoard, written without importing torch: the report's figures, and curves over layers.

``tensorboard/`` in the report folder has the figures and a layout of custom scalars with a category per ratio; below it
stands a run per system. Tags name the ratio, so a system keeps its colour and a chart holds all systems at one ratio.
"""

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MarginChartContent
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lightning_prune.comparison.figures import Plot, Shared
from lightning_prune.comparison.maps import BLOCKS, kept_fraction
from lightning_prune.comparison.plots import importance_share
from lightning_prune.comparison.run import Run
from lightning_prune.comparison.style import png
from lightning_prune.comparison.tables import display_names
from lightning_prune.support.escape import plain

FOLDER = "tensorboard"
IMPORTANCE, KEPT = "share of importance", "kept fraction"


def log_comparison(plots: Iterable[Plot], groups: Iterable[Shared], folder: Path) -> None:
    """Write ``folder/tensorboard``.

    Raises:
        OSError: it cannot be written or the disk is full.
    """
    place = folder / FOLDER
    categories: list[Category] = []
    taken: set[str] = set()
    for one in groups:
        names = display_names(one.runs)
        for name in dict.fromkeys(names.values()):
            setting = f" setting {one.number}" if one.number else ""
            with _writer(place / _folder_name(name + setting, taken)) as writer:
                for run in [run for run in one.runs if names[id(run)] == name]:
                    _curves(writer, one.tag(run.requested), run)
        categories += [_category(one.tag(ratio)) for ratio in one.ratios]
    with _writer(place) as writer:
        for plot in plots:
            image = Summary.Image(encoded_image_string=png(plot.figure), colorspace=4)
            _add(writer, Summary.Value(tag=plain(plot.tag), image=image), 0)
        _add(writer, _layout(categories), 0)


def _curves(writer: EventFileWriter, group: str, run: Run) -> None:
    """Scalars whose step is the layer."""
    curves = {f"{group}/{IMPORTANCE}": importance_share(run.units)}
    curves |= {f"{group}/{KEPT} {block}": kept_fraction(run.units, block) for block in BLOCKS}
    for tag, values in curves.items():
        for layer, value in enumerate(values):
            _add(writer, Summary.Value(tag=tag, simple_value=float(value)), layer)


def _category(group: str) -> Category:
    """The charts of one ratio, all methods in each. TensorBoard smooths every kind of curve but those with a margin,
    and smoothing over layers would show another curve; so these have one, of width 0."""
    charts = [
        Chart(title=f"{name} by layer", margin=MarginChartContent(series=[_series(f"{group}/{name}")]))
        for name in (*(f"{KEPT} {block}" for block in BLOCKS), IMPORTANCE)
    ]
    return Category(title=group, chart=charts)


def _series(tag: str) -> MarginChartContent.Series:
    return MarginChartContent.Series(value=tag, lower=tag, upper=tag)


def _layout(categories: list[Category]) -> Summary.Value:
    content = Layout(category=categories).SerializeToString()
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"))
    tensor = TensorProto(dtype=DT_STRING, string_val=[content])
    return Summary.Value(tag="custom_scalars__config__", tensor=tensor, metadata=metadata)


@contextmanager
def _writer(folder: Path) -> Iterator[EventFileWriter]:
    writer = EventFileWriter(str(folder))
    try:
        yield writer
    finally:
        writer.close()


def _add(writer: EventFileWriter, value: Summary.Value, step: int) -> None:
    writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))


def _folder_name(name: str, taken: set[str]) -> str:
    """``name`` as the name of a folder that is not ``taken`` yet, whatever a label holds."""
    safe = re.sub(r"[^A-Za-z0-9._ %,+-]+", "_", name)[:150].lstrip(". ") or "run"
    number, found = 2, safe
    while found in taken:
        found, number = f"{safe} ({number})", number + 1
    taken.add(found)
    return found
