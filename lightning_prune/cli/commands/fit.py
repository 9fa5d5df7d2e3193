"""``lightning-prune fit``: one model, one method, one run folder."""

from lightning_prune.cli.lightning_cli import PruneCLI
from lightning_prune.cli.output import Output
from lightning_prune.methods.base import PruningMethod
from lightning_prune.runs.run import prune_and_record
from lightning_prune.runs.summary import summary_table


def main(argv: list[str]) -> int:
    """Run the command and print the summary and where the pruned model is."""
    words, output = Output.take(argv)
    cli = PruneCLI(words, PruningMethod, subclasses=True, command="fit")
    folder, record = prune_and_record(cli.trainer, cli.model, cli.datamodule, cli.resolved_config, resume=cli.resume)
    if cli.trainer.is_global_zero:
        table = summary_table(cli.model.label, record.metrics)
        output.tell(table, record.metrics, folder, f"pruned model: {folder / 'pruned'}")
    return 0
