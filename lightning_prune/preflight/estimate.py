"""From dry runs on a few layers to what the whole run takes, and whether that fits."""

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from lightning_prune.calibration.residuals import SHARE
from lightning_prune.methods.base import PruningMethod
from lightning_prune.methods.hgsp import HGSP
from lightning_prune.methods.slimgpt import SlimGPT
from lightning_prune.preflight.dry_run import DryRun, PhaseUse, Shapes, Solves, dry_run
from lightning_prune.preflight.workload import Workload
from lightning_prune.support.errors import UserError

# What no tensor shows. GPU: context, kernels, cuBLAS workspaces; host: heaps, threads, packed operands.
DEVICE_OVERHEAD = 700 * 2**20
HOST_OVERHEAD = 60 * 2**20
# On a CPU in half precision oneDNN keeps a compiled kernel for every shape it met, at most what the variable says;
# layers of a pruned model have shapes of their own.
KERNELS, KERNELS_PER_LAYER, KERNEL_BYTES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", 1024), 16, 800_000
UNIT_BYTES = 400  # scores, decision and plan of one unit, and what writing them takes


@dataclass(frozen=True)
class Memory:
    """Bytes that this process may hold in all; ``device`` is None where layers run on the host itself."""

    host: int
    device: int | None


@dataclass(frozen=True)
class Estimate:
    """What one run takes, in bytes.

    ``device``: peak on the GPU, 0 where there is none. ``host``: peak of anonymous memory of this process, what it
    holds already included. ``phase``: where the device, or without one the host, is fullest. ``mapped``: residual
    streams in temporary files. ``new_weights``: refitted or masked weights on disk until the checkpoint is written.
    ``read``: parameters brought in while calibrating.
    """

    shapes: Shapes
    device: int
    host: int
    phase: str
    mapped: int
    new_weights: int
    checkpoint: int
    read: int
    evaluations: int
    flops: int
    limits: Memory

    @property
    def disk(self) -> int:
        """Most that is on disk at once beside the dense model."""
        return max(self.mapped, self.checkpoint) + self.new_weights

    @property
    def fits(self) -> bool:
        """Whether host and device are large enough."""
        return self.share <= 1

    @property
    def shortage(self) -> str:
        """What is missing where it does not fit, as a sentence."""
        needed, there, where = self.host, self.limits.host, "host memory"
        if self.limits.device is not None and self.device > self.limits.device:
            needed, there, where = self.device, self.limits.device, "device memory"
        return (
            f"onload {self.shapes.onload} takes {needed / 1e9:.2f} GB of {where} ({self.phase}), there is room for "
            f"{there / 1e9:.2f} GB."
        )

    @property
    def share(self) -> float:
        """Of the memory there is, on the device or the host, whichever is fuller; above 1 it does not fit."""
        device = 0.0 if self.limits.device is None else self.device / self.limits.device
        return max(device, self.host / self.limits.host)


def estimate(
    method: PruningMethod,
    shapes: Shapes,
    load: Workload,
    limits: Memory,
    held: int,
    context: Callable[[], AbstractContextManager[object]],
    solves: Solves,
) -> Estimate:
    """What ``method`` takes on a model of ``shapes``.

    Args:
        method: has seen the config.
        shapes, load: model and text.
        limits: memory of the device and the host.
        held: anonymous bytes of this process so far.
        context: of the trainer's precision.
        solves: SlimGPT's solver runs once per kind of block; share it between estimates of one model.
    """
    layers = shapes.config.num_hidden_layers
    free = limits.host - held if limits.device is None else limits.device - DEVICE_OVERHEAD
    if shapes.onload == "model" and (shapes.gpu or shapes.dtype != shapes.stored):
        free -= method.dense_parameters * shapes.dtype.itemsize  # of which the dry run holds a few layers only
    quadratic = isinstance(method, HGSP) and method.temperature > 0
    runs = [
        dry_run(method, shapes, load, short, free, context, solves)
        for short in sorted({min(short, layers) for short in ((2, 3, 4) if quadratic else (3, 4))})
    ]
    peaks = []
    for phase in runs[-1].phases:
        use = _at(runs, phase, layers)
        if phase == "evaluate" and method.uneven:  # of the pruned model
            use.host += UNIT_BYTES * sum(view.num_kv_heads + view.num_channels for view in method.layers)
        if phase == "evaluate" and not shapes.gpu and shapes.dtype.itemsize == 2:
            use.host += min(_kernels(), KERNELS_PER_LAYER * (layers if method.uneven else 1)) * KERNEL_BYTES
        peaks.append((phase, *_placed(use, shapes.gpu and phase != "save", limits, held)))
    pruned = int(method.dense_parameters * (1 - (method.requested_ratio or 0.0))) * shapes.saved.itemsize
    device = max(peaks, key=lambda peak: peak[1])
    host = max(peaks, key=lambda peak: peak[2])
    counts = [_polynomial([(run.layers, value(run)) for run in runs], layers) for value in _COUNTS]
    return Estimate(
        shapes=shapes,
        device=device[1] + DEVICE_OVERHEAD if shapes.gpu else 0,
        host=host[2],
        phase=device[0] if shapes.gpu else host[0],
        mapped=max(peak[3] for peak in peaks),
        checkpoint=pruned,
        new_weights=counts[3],
        read=method.steps * counts[2],
        evaluations=method.steps * counts[0],
        flops=method.steps * counts[1],
        limits=limits,
    )


_COUNTS: tuple[Callable[[DryRun], int], ...] = (
    lambda run: run.evaluations,
    lambda run: run.flops,
    lambda run: run.bytes_read,
    lambda run: run.disk,
)


def _placed(use: PhaseUse, gpu: bool, limits: Memory, held: int) -> tuple[int, int, int]:
    """Bytes on device, on the host, and in mapped files: a store is a file where it takes more than its share."""
    device = use.work if gpu else 0
    host = held + HOST_OVERHEAD + use.host + (0 if gpu else use.work)
    mapped = 0
    for size, count in sorted(use.stores.items()):
        for _ in range(count):
            if size <= SHARE * (limits.host - host):
                host += size
            else:
                mapped += size
    return device, host, mapped


def _at(runs: Sequence[DryRun], phase: str, layers: int) -> PhaseUse:
    """One phase of a decoder of ``layers`` layers: linear in their number."""
    known = [(run.layers, run.phases[phase]) for run in runs if phase in run.phases][-2:]
    sizes = {size for _, use in known for size in use.stores}
    return PhaseUse(
        work=_polynomial([(count, use.work) for count, use in known], layers),
        host=_polynomial([(count, use.host) for count, use in known], layers),
        stores=Counter(
            {size: max(0, _polynomial([(count, use.stores[size]) for count, use in known], layers)) for size in sizes}
        ),
    )


def _polynomial(known: Sequence[tuple[int, int]], at: int) -> int:
    """Lagrange's polynomial through the points; exact for whole numbers."""
    total = 0.0
    for index, (x, y) in enumerate(known):
        others = [other for number, (other, _) in enumerate(known) if number != index]
        total += y * math.prod((at - other) / (x - other) for other in others)
    return round(total)


def largest_ratio(method: PruningMethod) -> float:
    """The largest reachable ratio of all parameters, by bisection on what the method itself refuses."""
    low, high, wish = 0.0, 1.0, method.pruning_ratio
    for _ in range(12):
        method.pruning_ratio = (low + high) / 2
        try:
            method.check_ratio(method.layers, method.dense_parameters)
            low = method.pruning_ratio
        except UserError:
            high = method.pruning_ratio
    method.pruning_ratio = wish
    return low


def advice(found: Estimate, other: Estimate | None, method: PruningMethod, load: Workload) -> str:
    """What to change where it does not fit: the option that helps most in the phase that is too large."""
    if other is not None and other.fits and not found.fits:
        return f"--model.onload {other.shapes.onload} fits."
    words = []
    if found.shapes.dtype == torch.float32:
        words.append("--trainer.precision bf16-true halves weights and residual streams")
    if found.shapes.onload == "model":
        words.append("--model.onload layer keeps one layer in memory instead of all")
    if "prior" in found.phase and isinstance(method, HGSP):
        words.append(
            "--model.prior_num_samples 50 or fewer shortens the priors' residual streams, --model.temperature 0 leaves "
            "the priors out"
        )
    if "evaluate" in found.phase:
        words.append("a lower --data.eval_batch_size makes evaluation smaller")
    elif load.batch_size > 1:
        words.append("a lower --data.batch_size makes activations smaller")
    if load.samples > 32 and not isinstance(method, SlimGPT):
        words.append("a lower --data.num_samples shortens the residual streams")
    return "; ".join(words) + "." if words else "Use a device with more memory, or a shorter --data.seq_len."


def _kernels() -> int:
    name, default = KERNELS
    value = os.environ.get(name, "")
    return int(value) if value.isascii() and value.isdecimal() else default
