"""A trace of layers that are read while others run: when each was read from disk, when it ran, and how long it was
waited for.

    python benchmarks/reading_ahead.py
    python benchmarks/reading_ahead.py --layers 16 --batches 8

The files of a random Llama (``layer_memory.py``) are dropped from the page cache first, so reading means the disk. Its
layers then run one after another, as in a forward pass of calibration with ``--model.onload layer``.
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from layer_memory import random_model
from torch import Tensor

from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import LayeredModel
from lightning_prune.models.sources import Source

Span = tuple[float, float]


class Traced:
    """A source that notes when each call read, from the first page to the last; ``spans`` by the first name."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.spans: dict[str, tuple[Span, str]] = {}

    def read(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """Read the parameters, every page of them."""
        started = time.perf_counter()
        tensors = self.source.read(names, dtype, device)
        for tensor in tensors.values():
            tensor.view(torch.uint8).flatten()[::4096].sum(dtype=torch.int64)
        self.spans[names[0]] = (started, time.perf_counter()), threading.current_thread().name
        return tensors


def main() -> None:
    """Trace one walk through the layers and print a line per layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="decoder layers, 120 MB each (default: 8)")
    parser.add_argument("--batches", type=int, default=4, help="of 4 × 128 tokens per layer (default: 4)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lightning-prune-benchmark")
    arguments = parser.parse_args()
    folder = random_model(arguments.folder / f"llama-{arguments.layers}-layers", arguments.layers, experts=False)
    checkpoint = Checkpoint.open(str(folder))
    source = Traced(checkpoint.source())
    model = LayeredModel(checkpoint.skeleton(), source, None, torch.device("cpu"), "layer")
    streams = [torch.randn(4, 128, model.config.hidden_size, dtype=torch.bfloat16) for _ in range(arguments.batches)]
    model.embed(torch.zeros(4, 128, dtype=torch.long))
    for file in folder.glob("*.safetensors"):
        drop_from_cache(file)
    entered, ran, waited = [], [], []
    with torch.inference_mode():
        for index in range(model.num_layers):
            started = time.perf_counter()
            with model.layer(index):
                entered.append(time.perf_counter())
                waited.append(entered[-1] - started)
                model.announce(index + 1)
                streams = [model.run(index, stream) for stream in streams]
                ran.append(time.perf_counter())
    first = source.spans[next(iter(model.layer_names[0].values()))][0][0]
    print("milliseconds; layer, read by, read from – to, ran from – to, waited for")
    reading = hidden = 0.0
    for index, names in enumerate(model.layer_names):
        (begin, end), thread = source.spans[next(iter(names.values()))]
        at = [f"{1e3 * (moment - first):8.0f}" for moment in (begin, end, entered[index], ran[index])]
        print(f"{index:3} {thread:<12} {at[0]} – {at[1]}   {at[2]} – {at[3]}   {1e3 * waited[index]:6.0f}")
        reading += (end - begin) if index else 0.0
        hidden += max(0.0, end - begin - waited[index]) if index else 0.0
    print(f"of {reading:.2f} s of reading after the first layer, {hidden:.2f} s were while another layer ran")
    model.close()


def drop_from_cache(file: Path) -> None:
    """Ask the kernel to forget a file's pages, after what was not yet on disk is."""
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


if __name__ == "__main__":
    main()
