"""What a run takes on the device at hand, and where its weights therefore are."""

import sys
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.methods.base import PruningMethod
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import Onload
from lightning_prune.preflight.dry_run import Shapes, Solves
from lightning_prune.preflight.estimate import Estimate, Memory, advice, estimate
from lightning_prune.preflight.workload import Workload
from lightning_prune.support.errors import UserError
from lightning_prune.support.memory import anonymous_bytes, free_bytes, free_host_bytes

ROOM = 0.9  # of the memory that ``auto`` fills with a whole model: an estimate is no measurement
FIXED = 4 * 2**30  # bytes beside weights and residual streams that no small model needs


@dataclass(frozen=True)
class Preflight:
    """A method, a model and a text, and the memory there is.

    Attributes:
        config, stored: the model's, and the dtype of its weights on disk.
        held: anonymous bytes of this process before the run.
    """

    method: PruningMethod
    config: Any
    stored: torch.dtype
    load: Workload
    limits: Memory
    held: int
    solves: Solves

    @classmethod
    def of(
        cls,
        trainer: L.Trainer,
        method: PruningMethod,
        data: CalibrationDataModule,
        device_memory: int | None = None,
        host_memory: int | None = None,
    ) -> "Preflight":
        """From the options of a run; ``device_memory`` and ``host_memory`` stand for machines that are not here.

        Raises:
            UserError: what shapes and options alone can tell.
        """
        method.trainer = trainer
        checkpoint = method.checkpoint
        config = checkpoint.config
        method.check_before_loading(config)
        device, held = trainer.strategy.root_device, anonymous_bytes()
        gpu = device_memory is not None or device.type == "cuda"
        limits = Memory(
            host=host_memory or held + free_host_bytes() // trainer.num_devices,
            device=(device_memory or free_bytes(device)) if gpu else None,
        )
        load = Workload.of(data, method.needs_calibration, trainer.world_size)
        return cls(method, config, _dtype_on_disk(checkpoint), load, limits, held, Solves())

    def estimate(self, onload: Onload) -> Estimate:
        """What the run takes with its weights there."""
        method = self.method
        saved = self.stored if method.save_dtype == "auto" else getattr(torch, method.save_dtype)
        shapes = Shapes(self.config, self.stored, method.load_dtype, saved, self.limits.device is not None, onload)
        context = method.trainer.precision_plugin.forward_context
        return estimate(method, shapes, self.load, self.limits, self.held, context, self.solves)

    @property
    def is_small(self) -> bool:
        """Whether any method fits with room to spare, so that nothing need be estimated."""
        size = self.method.load_dtype.itemsize
        stream = self.load.samples * self.load.seq_len * self.config.hidden_size * size
        most = 8 * self.method.dense_parameters * size + 3 * self.config.num_hidden_layers * stream + FIXED
        free = self.limits.host - self.held
        return most <= free and (self.limits.device is None or most <= self.limits.device)


def place(trainer: L.Trainer, method: PruningMethod, data: CalibrationDataModule) -> None:
    """Turn ``onload auto`` into the placement that fits, before anything is read.

    Raises:
        UserError: the wished placement does not fit, or none does; says what is missing and what would help.
    """
    if method.saved is not None and not method.needs_calibration:  # nothing is walked but the evaluation
        return
    preflight = Preflight.of(trainer, method, data)
    wishes: tuple[Onload, ...] = ("model", "layer")
    if method.onload != "auto":
        wishes = tuple(onload for onload in wishes if onload == method.onload)
    if preflight.is_small:
        method.onload = wishes[0]
        return
    if trainer.is_global_zero:
        print("estimating what this run takes …", file=sys.stderr)
    tried = []
    for onload in wishes:
        found = preflight.estimate(onload)
        if found.fits and (len(wishes) == 1 or onload == "layer" or found.share <= ROOM):
            method.onload = onload
            return
        tried.append(found)
    least = tried[-1]
    other = preflight.estimate("layer") if least.shapes.onload == "model" else None
    raise UserError(f"--model.{least.shortage} {advice(least, other, method, preflight.load)}")


def _dtype_on_disk(checkpoint: Checkpoint) -> torch.dtype:
    """Of the weights; where there is a config alone, what it says."""
    try:
        return checkpoint.stored_dtype
    except UserError:
        named = getattr(checkpoint.config, "dtype", None)
        return named if isinstance(named, torch.dtype) else torch.bfloat16
