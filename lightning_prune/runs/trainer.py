"""The trainer of a run that calibrates: Lightning's, with the options that mean something to such a run."""

import os
import re
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, DeviceStatsMonitor, LambdaCallback, ModelSummary, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

from lightning_prune.support.devices import accelerator as find_accelerator
from lightning_prune.support.errors import UserError

Precision = Literal["32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed", "64-true"]
_HARMLESS = (ProgressBar, ModelSummary, DeviceStatsMonitor, LambdaCallback)


class CalibrationDDP(DDPStrategy):
    """Process group, samplers and barriers of DDP, without its wrapper that synchronises gradients.

    Statistics are sums that are reduced once at the end, so the wrapper would only cost gradient buckets of the model's
    size, and torch refuses it for a model without trainable parameters.
    """

    strategy_name = "calibration_ddp"

    def configure_ddp(self) -> None:
        """Return the model without DDP's wrapper."""

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


def calibration_trainer(
    accelerator: str = "auto",
    devices: list[int] | int | str = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    precision: Precision | None = None,
    default_root_dir: str = "logs",
    logger: Logger | list[Logger] | bool | None = None,
    callbacks: Callback | list[Callback] | None = None,
    enable_progress_bar: bool = True,
    profiler: Literal["simple", "advanced"] | None = None,  # pytorch's breaks on a second call of the trainer
    deterministic: bool | Literal["warn"] | None = None,
    benchmark: bool | None = None,
    detect_anomaly: bool = False,
) -> L.Trainer:
    """Lightning's trainer; what would change which samples are read is not among its options.

    Args:
        accelerator: ``cpu``, ``gpu``, another of Lightning's, or ``auto``: an accelerator where there is one.
        devices: Processes on this machine, each with its share of the samples; a list of devices; -1: all of them.
        num_nodes: Machines, where torchrun or SLURM started the processes.
        strategy: ``auto`` or ``ddp``.
        precision: Of weights and sums; default ``32-true``.
        default_root_dir: Where run folders go.
        logger: ``false`` for none, or loggers of Lightning (CSVLogger, WandbLogger, MLFlowLogger, …), which all get the
            same; by default TensorBoard in the run folder.
        callbacks: Your own, or those of Lightning that only watch.
        enable_progress_bar: ``false`` prints no progress.
        profiler: ``simple`` prints the seconds of every action of the trainer, ``advanced`` of every function in them.
        deterministic: Only deterministic algorithms.
        benchmark: Let cuDNN choose its algorithms by measuring them.
        detect_anomaly: Name the operation that made a NaN in a backward pass.

    Raises:
        UserError: a device, precision or strategy that is not there, splits the model, or loses the result; callbacks
            that train, stop or save.
    """
    options: dict[str, Any] = dict(locals())
    own = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
    for one in own:
        if type(one).__module__.startswith("lightning.") and not isinstance(one, _HARMLESS):
            raise UserError(
                f"--trainer.callbacks: {type(one).__name__} is made for training; a run takes no training step and may "
                f"not end early. Allowed are {', '.join(kind.__name__ for kind in _HARMLESS)}, and your own."
            )
    options |= {
        "callbacks": own,
        "devices": cpu_processes(accelerator, devices),
        "enable_progress_bar": any(isinstance(one, ProgressBar) for one in own),  # else the method shows its own
        "max_epochs": 1,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    trainer = _trainer(options)
    # Lightning alone knows what auto, -1, a list or a launcher's environment amount to, so it is asked first.
    if type(trainer.strategy) is DDPStrategy and not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        trainer = _trainer(options | {"strategy": CalibrationDDP()})
    if not isinstance(trainer.strategy, SingleDeviceStrategy | CalibrationDDP):
        raise UserError(
            f"--trainer.strategy: {type(trainer.strategy).__name__} splits the model, or runs where its result would "
            "be lost. Leave it out: every process holds the model and reads its share of the calibration set."
        )
    _check_processes(trainer)
    return trainer


def _trainer(options: dict[str, Any]) -> L.Trainer:
    """Lightning's trainer; UserError for options that it refuses, or a precision that it silently replaces."""
    try:
        trainer = L.Trainer(**options)
    except (MisconfigurationException, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if re.search("backend found|can not run on your system", str(error)):
            raise UserError(
                f"--trainer.accelerator: found {options['accelerator']}, which this machine does not have, or torch "
                "does not see. Give cpu, or auto, which takes an accelerator where there is one."
            ) from error
        raise UserError(f"--trainer: {error}") from error
    if str(options["precision"]) == "16-mixed" and str(trainer.precision) != "16-mixed":
        raise UserError(
            "--trainer.precision: found 16-mixed, which Lightning runs on GPUs only; this run is on the CPU. "
            "Allowed there: 32-true, bf16-true, 16-true, bf16-mixed, 64-true."
        )
    return trainer


def cpu_processes(accelerator: str, devices: Any) -> Any:
    """``--trainer.devices`` for Lightning, which takes only a number on the CPU: there a list counts its entries."""
    if accelerator != "cpu" and not (accelerator == "auto" and find_accelerator() is None):
        return devices
    text = "1" if devices == "auto" else str(devices)
    listed = re.findall(r"\d+", text) if re.fullmatch(r"\[?\d+(, *\d+)*\]?", text) else []
    count = int(text) if re.fullmatch(r"\d{1,9}", text) else len(listed) if len(listed) == len(set(listed)) else 0
    most = max(8, os.cpu_count() or 1)
    if not 1 <= count <= most:
        raise UserError(
            f"--trainer.devices: found {devices}; on the CPU it is the number of processes, from 1 to {most} here."
        )
    return count


def _check_processes(trainer: L.Trainer) -> None:
    started = int(os.environ["WORLD_SIZE"]) if torch.distributed.is_torchelastic_launched() else None
    if started is not None and started != trainer.world_size:
        raise UserError(
            f"--trainer.devices: torchrun started {started} processes, but the options make {trainer.world_size} "
            f"({trainer.num_devices} on each of {trainer.num_nodes} nodes). Set --trainer.devices and "
            "--trainer.num_nodes to what was started."
        )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and "NODE_RANK" not in os.environ:
        raise UserError(
            f"--trainer.num_nodes: found {trainer.num_nodes}, but nothing says which node this is. Start with torchrun "
            "or SLURM, or set NODE_RANK, MASTER_ADDR and MASTER_PORT on every node."
        )
