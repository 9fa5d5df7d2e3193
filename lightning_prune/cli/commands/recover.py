"""``lightning-prune recover``: train a pruned model to give back what pruning took."""

from typing import Any, ClassVar

from lightning_prune.cli.parser import OUTPUT, RESUME, tell
from lightning_prune.recovery import Recovery, RecoveryDataModule
from lightning_prune.recovery.train import recovery_trainer
from lightning_prune.runs.build import RunBuilder
from lightning_prune.runs.folder import FinishedRun, check_label
from lightning_prune.runs.recover import parent_run, recover_and_record
from lightning_prune.runs.verdict import recovery_table

DESCRIPTION = (
    "Train a pruned model on text and by what the dense model predicts, and measure what that gave back. Examples: "
    "lightning-prune recover --config recover_lora --model.pretrained logs/wanda/version_0/pruned; lightning-prune "
    "recover --config recover_full --model.pretrained logs/wanda/version_0/pruned --trainer.max_time 00:00:10:00"
)


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
        """Label of the new run: that of the run that pruned, and how the model is trained."""
        self.run = parent_run(self.model.pretrained)
        suffix = "lora" if self.model.train_what == "lora" else "full"
        self.model.label = check_label(self.model.label or f"{self.run.metrics.method.label}_{suffix}")
        return self.model.label


def main(argv: list[str]) -> int:
    """Run the command and print what was regained and where the model is."""
    cli = RecoverCLI(argv)
    folder, metrics = recover_and_record(
        cli.trainer, cli.model, cli.datamodule, cli.run, cli.resolved_config, resume=cli.option("resume")
    )
    tell(cli, recovery_table(cli.model.label, metrics), metrics, folder)
    return 0
