"""``lightning-prune recover``: train a pruned model to give back what pruning took."""

from lightning_prune.cli.parser import tell
from lightning_prune.cli.recover_cli import RecoverCLI
from lightning_prune.runs.recover import recover_and_record
from lightning_prune.runs.recovered import recovery_table


def main(argv: list[str]) -> int:
    """Run the command and print what was regained and where the model is."""
    cli = RecoverCLI(argv)
    folder, record = recover_and_record(
        cli.trainer, cli.model, cli.datamodule, cli.run, cli.resolved_config, resume=cli.option("resume")
    )
    table = recovery_table(cli.model.label, record.metrics)
    tell(cli, table, record.metrics, folder, f"pruned model: {folder / 'pruned'}")
    return 0
