"""``lightning-prune recover``: train a pruned model to give back what pruning took."""

from typing import Any, ClassVar

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_prune.cli.lightning_cli import PruneCLI
from lightning_prune.cli.output import Output
from lightning_prune.recovery import Recovery, RecoveryDataModule
from lightning_prune.recovery.train import recovery_trainer
from lightning_prune.runs.folder import FinishedRun, check_label
from lightning_prune.runs.recover import parent_run, recover_and_record
from lightning_prune.runs.recovered import recovery_table
from lightning_prune.support.progress import Progress


class RecoverCLI(PruneCLI):
    """Parses and builds trainer, model and data; ``run`` is the run that pruned."""

    data_class = RecoveryDataModule
    defaults: ClassVar[dict[str, Any]] = {}  # those of recovery_trainer
    model: Recovery
    datamodule: RecoveryDataModule
    run: FinishedRun

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.trainer_class = recovery_trainer
        super().add_core_arguments_to_parser(parser)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """TensorBoard below ``<root>/<label>`` unless the user asks for another logger or none.

        Raises:
            UserError: no run has pruned the model, or a trainer that cannot be.
        """
        self.run = parent_run(self.model.pretrained)
        suffix = "lora" if self.model.train_what == "lora" else "full"
        self.model.label = check_label(self.model.label or f"{self.run.metrics.method.label}_{suffix}")
        options = self._get(self.config_init, "trainer")
        if options["enable_progress_bar"]:
            self.model.progress = Progress()
            self.datamodule.show_progress()
        if options["logger"] in (None, True):
            root = options["default_root_dir"]
            kwargs["logger"] = TensorBoardLogger(root, name=self.model.label, default_hp_metric=False)
        return LightningCLI.instantiate_trainer(self, **kwargs)


def main(argv: list[str]) -> int:
    """Run the command and print what was regained and where the model is."""
    words, output = Output.take(argv)
    cli = RecoverCLI(words, Recovery, subclasses=False, command="recover")
    folder, record = recover_and_record(
        cli.trainer, cli.model, cli.datamodule, cli.run, cli.resolved_config, resume=cli.resume
    )
    table = recovery_table(cli.model.label, record.metrics)
    output.tell(table, record.metrics, folder, f"pruned model: {folder / 'pruned'}")
    return 0
