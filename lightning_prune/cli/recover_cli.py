"""LightningCLI for ``recover``: a trainer that trains, in one process, with its states in the run folder."""

from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_prune.cli.lightning_cli import PruneCLI
from lightning_prune.cli.trainer_options import Fixed, check_fixed
from lightning_prune.recovery import Recovery, RecoveryDataModule
from lightning_prune.recovery.module import HELD_OUT
from lightning_prune.runs.folder import FinishedRun, check_label
from lightning_prune.runs.recover import parent_run
from lightning_prune.support.errors import UserError

_FIXED: Fixed = {
    "fast_dev_run": ((False, 0), "a run ends with a checkpoint. --trainer.max_steps makes it short."),
    "overfit_batches": ((0.0, 0), "the held-out share would be trained on. Leave it out."),
    "limit_val_batches": ((1.0, None), "the held-out loss is of the whole held-out share: lower --data.held_out."),
    "limit_test_batches": ((1.0, None), "perplexity is of whole evaluation sets. Leave it out."),
    "limit_predict_batches": ((1.0, None), "nothing is predicted. Leave it out."),
    "check_val_every_n_epoch": ((1,), "the best state is chosen by the held-out loss. Leave it out."),
    "num_sanity_val_steps": ((0, 2, None), "the held-out loss is measured before training. Leave it out."),
    "enable_checkpointing": ((False, None), "the best and the last state are kept in any case. Leave it out."),
    "reload_dataloaders_every_n_epochs": ((0,), "the text stays the same. Leave it out."),
    "model_registry": ((None,), "the model is saved in the run folder. Leave it out."),
    "barebones": ((False,), "a run records what it did. Leave it out."),
    "plugins": ((None, []), "precision is chosen by --trainer.precision. Leave it out."),
    "sync_batchnorm": ((False,), "there is one process. Leave it out."),
}


class RecoverCLI(PruneCLI):
    """Parses and builds trainer, model and data; ``run`` is the run that pruned."""

    data_class = RecoveryDataModule
    defaults = PruneCLI.defaults | {"max_epochs": 3, "gradient_clip_val": 1.0, "log_every_n_steps": 10}
    model: Recovery
    datamodule: RecoveryDataModule
    run: FinishedRun

    def __init__(self, argv: list[str]) -> None:
        super().__init__(argv, Recovery, subclasses=False, command="recover")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """TensorBoard below ``<root>/<label>`` unless the user asks for another logger or none.

        Raises:
            UserError: no run behind the model, or a trainer that cannot be, runs several processes, or never ends.
        """
        self.run = parent_run(self.model.pretrained)
        if self.model.given_label is None:
            suffix = "lora" if self.model.train_what == "lora" else "full"
            self.model.label = f"{self.run.metrics.method.label}_{suffix}"
        check_label(self.model.label)
        options = dict(self._get(self.config_init, "trainer"))
        check_fixed(options, _FIXED)
        if options["max_epochs"] in (None, -1) and options["max_steps"] == -1 and options["max_time"] is None:
            raise UserError("--trainer.max_epochs: nothing ends this run. Give max_epochs, max_steps or max_time.")
        callbacks = options["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
        if any(isinstance(one, ModelCheckpoint) for one in callbacks):
            raise UserError(
                "--trainer.callbacks: ModelCheckpoint is there already: the best and the last state are kept in the "
                "run folder while training is under way. Leave it out."
            )
        for one in callbacks:
            if isinstance(one, EarlyStopping) and one.monitor != HELD_OUT:
                raise UserError(
                    f"--trainer.callbacks: EarlyStopping watches '{one.monitor}', which a recovery does not measure "
                    f"between epochs. Let it watch '{HELD_OUT}', or leave it out: --model.patience does the same."
                )
        trainer = self._trainer(kwargs | self._surroundings(options, callbacks, self.model.label), None)
        if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise UserError(
                f"--trainer.devices: teacher and student are trained in one process on one device, found "
                f"{trainer.world_size}. Set --trainer.devices 1 and leave --trainer.strategy out."
            )
        return self._checked(trainer, options["precision"])
