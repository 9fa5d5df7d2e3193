"""Which of Lightning's trainer options mean something to a run that calibrates once and takes no training step."""

from typing import Any

from lightning.pytorch.callbacks import Callback, DeviceStatsMonitor, LambdaCallback, ModelSummary, ProgressBar

from lightning_prune.support.errors import UserError

_WHOLE_SETS = (
    "every run reads the whole calibration and evaluation sets as often as its method needs, so that runs can be "
    "compared. Leave it out; --data.num_samples and --data.eval_datasets make a run shorter."
)
_NO_STEPS = "no run takes a training step, so there is nothing it could act on. Leave it out."
_NO_VALIDATION = (
    "no validation set is read: perplexity is measured before and after pruning, on --data.eval_datasets. Leave it out."
)
Fixed = dict[str, tuple[tuple[Any, ...], str]]  # option → values it may have, and why no other
_FIXED: Fixed = {
    "max_epochs": ((1, None), _WHOLE_SETS),
    "min_epochs": ((None,), _WHOLE_SETS),
    "max_steps": ((-1,), _WHOLE_SETS),
    "min_steps": ((None,), _WHOLE_SETS),
    "max_time": ((None,), _WHOLE_SETS),
    "limit_train_batches": ((1.0, None), _WHOLE_SETS),
    "limit_test_batches": ((1.0, None), _WHOLE_SETS),
    "overfit_batches": ((0.0, 0), _WHOLE_SETS),
    "fast_dev_run": ((False, 0), _WHOLE_SETS),
    "reload_dataloaders_every_n_epochs": ((0,), _WHOLE_SETS),
    "use_distributed_sampler": ((True,), "every process reads its own share without repeats. Leave it out."),
    "limit_val_batches": ((1.0, None), _NO_VALIDATION),
    "limit_predict_batches": ((1.0, None), _NO_VALIDATION),
    "val_check_interval": ((1.0, None), _NO_VALIDATION),
    "check_val_every_n_epoch": ((1, None), _NO_VALIDATION),
    "num_sanity_val_steps": ((0, 2, None), _NO_VALIDATION),  # 2 is Lightning's default
    "accumulate_grad_batches": ((1,), _NO_STEPS),
    "gradient_clip_val": ((None, 0, 0.0), _NO_STEPS),
    "gradient_clip_algorithm": ((None,), _NO_STEPS),
    "sync_batchnorm": ((False,), _NO_STEPS),
    "enable_checkpointing": ((False, None), "the pruned model is saved in any case. Leave it out."),
    "model_registry": ((None,), "the pruned model is saved in the run folder. Leave it out."),
    "barebones": ((False,), "a run records what it did. Leave it out."),
    "plugins": ((None, []), "precision and processes are chosen by --trainer.precision and --trainer.devices."),
}
_CALLBACKS = (ProgressBar, ModelSummary, DeviceStatsMonitor, LambdaCallback)


def check_fixed(options: dict[str, Any], fixed: Fixed = _FIXED) -> None:
    """Refuse a value that would change what is read, or that would be ignored.

    Args:
        options: the trainer's, by name.
        fixed: what is allowed; by default to a run that calibrates.

    Raises:
        UserError: names the option and why it has no other value.
    """
    for name, (allowed, why) in fixed.items():
        value = options.get(name)
        # By their text: limit_train_batches 1 is one batch, 1.0 all of them.
        if repr(value) not in [repr(item) for item in allowed]:
            raise UserError(f"--trainer.{name}: found {value}; {why}")


def check_callbacks(callbacks: Any) -> list[Callback]:
    """The callbacks as a list; those of Lightning that train, stop or save are refused, a user's own are welcome.

    Raises:
        UserError: names the callback and those that are allowed.
    """
    found: list[Callback] = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
    for callback in found:
        if type(callback).__module__.startswith("lightning.") and not isinstance(callback, _CALLBACKS):
            allowed = ", ".join(kind.__name__ for kind in _CALLBACKS)
            raise UserError(
                f"--trainer.callbacks: {type(callback).__name__} is made for training; a run takes no training step "
                f"and may not end early. Allowed are {allowed}, and callbacks of your own."
            )
    return found
