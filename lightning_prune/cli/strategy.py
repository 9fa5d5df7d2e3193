"""Several processes for calibration: Lightning's DDP without the gradient-synchronising wrapper.

Statistics are sums that are reduced once at the end, so wrapping the model would only cost gradient buckets of its
size, and is refused for a model without trainable parameters.
"""

import os
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

from lightning_prune.support.errors import UserError


class CalibrationDDP(DDPStrategy):
    """Process group, samplers and barriers of DDP; the model stays as it is on every rank."""

    strategy_name = "calibration_ddp"

    def configure_ddp(self) -> None:
        """No wrapper."""

    def setup(self, trainer: L.Trainer) -> None:
        """Every rank reads the same files, so nothing is sent: a broadcast would copy what is mapped from them."""
        assert self.model is not None
        names = [name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())]
        setattr(self.model, "_ddp_params_and_buffers_to_ignore", names)  # noqa: B010 - torch's broadcast looks for it
        super().setup(trainer)

    def on_exception(self, exception: BaseException) -> None:
        """End the processes that this one started: they would wait for it, and then say so at length."""
        super().on_exception(exception)
        if isinstance(self.launcher, _SubprocessScriptLauncher):
            started = list(self.launcher.procs)
            self.launcher.procs.clear()  # Lightning's observer of this list kills this process when one of them ends
            for process in started:
                process.kill()
            for process in started:
                process.wait()


def trainer_for_calibration(build: Callable[[Strategy | None], L.Trainer]) -> L.Trainer:
    """The trainer that Lightning makes of the user's options, with ``CalibrationDDP`` wherever it takes its own DDP.

    Lightning alone knows what ``auto``, ``-1``, a list or a launcher's environment amount to, so it is asked first.

    Args:
        build: makes a trainer with the strategy given, or with the user's own for None.

    Raises:
        UserError: a strategy that splits or copies the model, or processes that do not fit the launcher's.
    """
    trainer = build(None)
    if type(trainer.strategy) is DDPStrategy and not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        trainer = build(CalibrationDDP())
    if not isinstance(trainer.strategy, SingleDeviceStrategy | CalibrationDDP):
        raise UserError(
            f"--trainer.strategy: {type(trainer.strategy).__name__} splits the model, or runs where its result would "
            "be lost. Leave it out: every process holds the model and reads its share of the calibration set."
        )
    _check_processes(trainer)
    return trainer


def cpu_processes(accelerator: Any, devices: Any) -> Any:
    """``--trainer.devices`` for Lightning, which takes nothing but a number on the CPU: a list counts its entries.

    Raises:
        UserError: not a number of processes that this machine could run.
    """
    if accelerator != "cpu" and not (accelerator == "auto" and not torch.accelerator.is_available()):
        return devices
    if devices == "auto":
        return 1
    several = isinstance(devices, str) and any(sign in devices for sign in "[,")
    entries = devices.strip(" []").split(",") if several else devices
    try:
        count = len({int(entry) for entry in entries}) if isinstance(entries, list) else int(entries)
    except (TypeError, ValueError):
        count = 0
    most = max(8, os.cpu_count() or 1)
    if not 1 <= count <= most or (isinstance(entries, list) and count != len(entries)):
        raise UserError(
            f"--trainer.devices: found {devices}; on the CPU it is the number of processes, from 1 to {most} here."
        )
    return count


def _check_processes(trainer: L.Trainer) -> None:
    started = int(os.environ["WORLD_SIZE"]) if torch.distributed.is_torchelastic_launched() else None
    if started is not None and started != trainer.world_size:
        raise UserError(
            f"--trainer.devices: torchrun started {started} processes, but the options ask for {trainer.world_size} "
            f"({trainer.num_devices} on each of {trainer.num_nodes} nodes). Set --trainer.devices and "
            "--trainer.num_nodes to what was started."
        )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and "NODE_RANK" not in os.environ:
        raise UserError(
            f"--trainer.num_nodes: found {trainer.num_nodes}, but nothing says which node this is. Start with torchrun "
            "or SLURM, or set NODE_RANK, MASTER_ADDR and MASTER_PORT on every node."
        )
