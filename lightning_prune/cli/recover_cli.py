"""LightningCLI for ``recover``: a trainer that trains, in one process, with its states in the run folder."""

from datetime import timedelta
from typing import Any, ClassVar, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_prune.cli.parser import OUTPUT, RESUME
from lightning_prune.recovery import Recovery, RecoveryDataModule
from lightning_prune.recovery.module import HELD_OUT
from lightning_prune.runs.build import RunBuilder
from lightning_prune.runs.folder import FinishedRun, check_label
from lightning_prune.runs.recover import parent_run
from lightning_prune.runs.trainer import DEFAULT_ROOT, Precision, cpu_processes, make_trainer
from lightning_prune.support.errors import UserError

DESCRIPTION = (
    "Train a pruned model on text and by what the dense model predicts, and measure what that gave back. Examples: "
    "lightning-prune recover --config recover_lora --model.pretrained logs/wanda/version_0/pruned; lightning-prune "
    "recover --config recover_full --model.pretrained logs/wanda/version_0/pruned --trainer.max_time 00:00:10:00"
)


def recovery_trainer(
    max_epochs: int | None = 3,
    max_steps: int = -1,
    max_time: str | timedelta | dict[str, int] | None = None,
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = 1.0,
    val_check_interval: int | float | None = None,
    log_every_n_steps: int = 10,
    accelerator: str = "auto",
    devices: list[int] | int | str = 1,
    strategy: str = "auto",
    precision: Precision | None = None,
    default_root_dir: str = DEFAULT_ROOT,
    logger: Logger | list[Logger] | bool | None = None,
    callbacks: Callback | list[Callback] | None = None,
    enable_progress_bar: bool = True,
    profiler: Literal["simple", "advanced", "pytorch"] | None = None,
    deterministic: bool | Literal["warn"] | None = None,
    benchmark: bool | None = None,
    detect_anomaly: bool = False,
) -> L.Trainer:
    """Lightning's trainer of one process; the held-out share and the evaluation sets are always read whole.

    Args:
        max_epochs: How often the text is trained on, unless something else ends the run.
        max_steps: Optimiser steps after which it ends.
        max_time: DD:HH:MM:SS after which it ends.
        accumulate_grad_batches: Batches in one optimiser step.
        gradient_clip_val: Largest norm of the gradient.
        val_check_interval: Batches, or share of an epoch, between two measurements of the held-out loss.
        log_every_n_steps: Steps between two logged values.
        accelerator: ``cpu``, ``gpu``, another of Lightning's, or ``auto``: an accelerator where there is one.
        devices: One, by number in a list.
        strategy: ``auto``.
        precision: Of weights and sums; default ``32-true``.
        default_root_dir: Where run folders go.
        logger: ``false`` for none, or loggers of Lightning; by default TensorBoard in the run folder.
        callbacks: Your own, or Lightning's.
        enable_progress_bar: ``false`` prints no progress.
        profiler: Lightning's, by name.
        deterministic: Only deterministic algorithms.
        benchmark: Let cuDNN choose its algorithms by measuring them.
        detect_anomaly: Name the operation that made a NaN in a backward pass.

    Raises:
        UserError: options that Lightning refuses, that never end, or that start several processes; callbacks that
            would take the place of the run's own.
    """
    options: dict[str, Any] = dict(locals())
    own = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
    if max_epochs in (None, -1) and max_steps == -1 and max_time is None:
        raise UserError("--trainer.max_epochs: nothing ends this run. Give max_epochs, max_steps or max_time.")
    for one in own:
        if isinstance(one, ModelCheckpoint):
            raise UserError(
                "--trainer.callbacks: ModelCheckpoint is there already: the best and the last state are kept in the "
                "run folder while training is under way. Leave it out."
            )
        if isinstance(one, EarlyStopping) and one.monitor != HELD_OUT:
            raise UserError(
                f"--trainer.callbacks: EarlyStopping watches '{one.monitor}', which a recovery does not measure "
                f"between epochs. Let it watch '{HELD_OUT}', or leave it out: --model.patience does the same."
            )
    trainer = make_trainer(
        options
        | {
            "callbacks": own,
            "devices": cpu_processes(accelerator, devices),
            "enable_progress_bar": any(isinstance(one, ProgressBar) for one in own),
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
    )
    if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise UserError(
            f"--trainer.devices: teacher and student are trained in one process on one device, found "
            f"{trainer.world_size}. Set --trainer.devices 1 and leave --trainer.strategy out."
        )
    return trainer


class RecoverCLI(RunBuilder):
    """Parses and builds trainer, model and data; ``run`` is the run that pruned."""

    data_class = RecoveryDataModule
    trainer_maker: ClassVar[Any] = staticmethod(recovery_trainer)
    model: Recovery
    datamodule: RecoveryDataModule
    run: FinishedRun

    def __init__(self, argv: list[str]) -> None:
        super().__init__(argv, Recovery, "recover", DESCRIPTION, {"resume": RESUME} | OUTPUT)

    def label(self) -> str:
        """Of the run that pruned, and how it is trained.

        Raises:
            UserError: no run pruned the model.
        """
        self.run = parent_run(self.model.pretrained)
        if self.model.given_label is None:
            suffix = "lora" if self.model.train_what == "lora" else "full"
            self.model.label = f"{self.run.metrics.method.label}_{suffix}"
        check_label(self.model.label)
        return self.model.label
