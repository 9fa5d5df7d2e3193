"""Training from start or from the last kept state to the best one."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.models.model_slot import DTYPES
from lightning_prune.recovery.data import RecoveryDataModule
from lightning_prune.recovery.module import HELD_OUT, Recovery
from lightning_prune.support.errors import UserError


def recovery_trainer(
    devices: list[int] | str | int = 1,
    max_epochs: int = 3,
    callbacks: list[Callback] | Callback | None = None,
    enable_progress_bar: bool = True,
    gradient_clip_val: float | None = 1.0,
    log_every_n_steps: int = 10,
    default_root_dir: str = "logs",
    **kwargs: Any,
) -> L.Trainer:
    """Lightning's trainer; what would take the choice of the best state away from ``train`` is not an option.

    Args:
        devices: The one device, as its number in a list.
        max_epochs: Most rounds through the text; -1: no bound.
        callbacks: Your own. EarlyStopping and ModelCheckpoint are there already.
        enable_progress_bar: ``false`` prints no progress.
        gradient_clip_val: Largest norm of the gradient.
        log_every_n_steps: Steps between two log entries.
        default_root_dir: Where run folders go.

    Raises:
        UserError: options that Lightning refuses, several devices, or nothing that ends the run.
    """
    if max_epochs == kwargs.get("max_steps", -1) == -1 and kwargs.get("max_time") is None:
        raise UserError("--trainer.max_epochs: this run would never end. Give max_epochs, max_steps or max_time.")
    try:
        trainer = L.Trainer(
            devices=devices,
            max_epochs=max_epochs,
            callbacks=_own_callbacks(callbacks),
            gradient_clip_val=gradient_clip_val,
            log_every_n_steps=log_every_n_steps,
            default_root_dir=default_root_dir,
            enable_progress_bar=False,  # the module shows its own
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            num_nodes=1,
            strategy="auto",
            fast_dev_run=False,
            overfit_batches=0.0,
            limit_train_batches=1.0,
            limit_val_batches=1.0,
            limit_test_batches=1.0,
            limit_predict_batches=1.0,
            check_val_every_n_epoch=1,
            min_epochs=None,
            min_steps=None,
            reload_dataloaders_every_n_epochs=0,
            use_distributed_sampler=True,
            inference_mode=True,
            sync_batchnorm=False,
            barebones=False,
            plugins=None,
            model_registry=None,
            **kwargs,
        )
    except (MisconfigurationException, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--trainer: {error}") from error
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise UserError("--trainer.devices: teacher and student are trained on one device. Give one.")
    _check_precision(trainer, kwargs.get("precision"))
    return trainer


def _own_callbacks(callbacks: list[Callback] | Callback | None) -> list[Callback]:
    """The user's callbacks as a list, without those that ``train`` adds."""
    own = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
    if any(isinstance(one, EarlyStopping | ModelCheckpoint) for one in own):
        raise UserError(
            "--trainer.callbacks: leave EarlyStopping and ModelCheckpoint out: the best state is kept in any case, and "
            "--model.patience says when training ends."
        )
    return own


def _check_precision(trainer: L.Trainer, requested: Any) -> None:
    if requested in (16, "16", "16-mixed") and trainer.precision != "16-mixed":
        raise UserError("--trainer.precision: Lightning runs 16-mixed on GPUs only. On the CPU take bf16-mixed.")
    if str(trainer.precision) not in DTYPES or trainer.precision == "64-true":
        raise UserError(f"--trainer.precision: found {trainer.precision}; allowed: {', '.join(DTYPES)}, but 64-true.")


def train(trainer: L.Trainer, module: Recovery, data: RecoveryDataModule, folder: Path) -> dict[str, Any]:
    """Train until steps, epochs, time or a held-out loss that does not fall end it; what ``recovery.json`` says of it.

    ``module``, which is open, then has the state with the lowest held-out loss, which may be the one before training.
    The best and the last state are kept in ``folder``; training continues from the last one if there is one.

    Raises:
        UserError: the last state cannot be read.
        FloatingPointError: the loss is not finite.
    """
    kept = ModelCheckpoint(
        folder, "best", HELD_OUT, save_last=True, auto_insert_metric_name=False, enable_version_counter=False
    )
    patience = EarlyStopping(HELD_OUT, patience=module.patience, check_on_train_epoch_end=False)
    rate = [LearningRateMonitor("step")] if trainer.loggers else []
    # The clock of --trainer.max_time, or one without an end. Its time is part of the states.
    timer = next((one for one in trainer.callbacks if isinstance(one, Timer)), None)  # type: ignore[attr-defined]
    clock = timer or Timer(verbose=False)
    trainer.callbacks += [*([] if timer else [clock]), *rate, patience, kept]  # type: ignore[attr-defined]
    trainer.validate(module, data, verbose=False)
    before = float(trainer.callback_metrics[HELD_OUT])
    last = folder / "last.ckpt"
    resumed = _readable(last) if last.is_file() else None
    folder.mkdir(exist_ok=True)
    trained = [name for name, one in module.named_parameters() if one.requires_grad]
    torch.save({name: module.get_parameter(name).detach() for name in trained}, folder / "start.pt")
    trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
    module.progress.finish("training")
    module.seconds["train"] = clock.time_elapsed()
    trainer.validate(module, data, verbose=False)  # steps may end a run between two measurements
    after = float(trainer.callback_metrics[HELD_OUT])
    if kept.best_model_score is not None and float(kept.best_model_score) < after:
        after = float(kept.best_model_score)
        best = torch.load(kept.best_model_path, map_location="cpu", weights_only=True)
        module.load_state_dict(best["state_dict"], strict=False)
    if after > before:
        rank_zero_warn(
            f"no state had a lower held-out loss than the pruned model's {before:.4f}, the best {after:.4f}: the "
            f"weights are left as they were. Lower --model.learning_rate, now {module.learning_rate:g}, or train on "
            "more text."
        )
        after = before
        module.load_state_dict(torch.load(folder / "start.pt", map_location="cpu", weights_only=True), strict=False)
    return {
        "train": module.train_what,
        "teacher": module.teacher if module.distillation > 0 else None,
        "precision": str(trainer.precision),
        "trainable_parameters": sum(one.numel() for one in module.parameters() if one.requires_grad),
        "steps": trainer.global_step,
        "tokens_seen": module.tokens_seen,
        "seconds": round(module.seconds["train"], 3),
        "stopped_by": _stopped_by(trainer, patience, clock),
        "held_out_loss": {"before": before, "after": after},
        "text": data.manifest,
    }


def _readable(last: Path) -> str:
    """The path of a kept state, after a look at it."""
    try:
        torch.load(last, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch have no error in common
        raise UserError(
            f"--resume: the state in '{last}' cannot be read ({type(error).__name__}). Leave --resume out to begin "
            "anew."
        ) from None
    return str(last)


def _stopped_by(trainer: L.Trainer, patience: EarlyStopping, clock: Timer) -> str:
    left = clock.time_remaining()
    if left is not None and left <= 0:
        return "time"
    if patience.wait_count >= patience.patience:
        return "held-out loss"
    return "steps" if 0 < trainer.max_steps <= trainer.global_step else "epochs"
