"""The comparison as TensorBoard images, written without importing torch."""

import io
import time
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lightning_prune.comparison.figures import Plot
from lightning_prune.comparison.style import SETTINGS
from lightning_prune.escape import plain

DPI = 110


def log_plots(plots: Iterable[Plot], folder: Path) -> None:
    """One image per plot, under its tag, in a new events file in ``folder``."""
    writer = EventFileWriter(str(folder))
    try:
        for plot in plots:
            buffer = io.BytesIO()
            with matplotlib.rc_context(SETTINGS):
                plot.figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight")
            image = Summary.Image(encoded_image_string=buffer.getvalue(), colorspace=4)
            summary = Summary(value=[Summary.Value(tag=plain(plot.tag).strip("/"), image=image)])
            writer.add_event(Event(wall_time=time.time(), step=0, summary=summary))
    finally:
        writer.close()
