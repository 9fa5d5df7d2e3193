"""``lightning-prune test``: perplexity of any model, dense or pruned."""

from lightning_prune.cli.lightning_cli import PruneCLI
from lightning_prune.runs.run import evaluate_and_record
from lightning_prune.walk.module import LayeredModule


def main(argv: list[str]) -> int:
    """Run the command, print one line per evaluation set, and write ``metrics.json``."""
    cli = PruneCLI(argv, LayeredModule, subclasses=False, command="test")
    folder, record = evaluate_and_record(cli.trainer, cli.model, cli.datamodule, cli.resolved_config)
    if cli.trainer.is_global_zero:
        print(f"\n{cli.model.pretrained}: {record.metrics['parameters']:,} parameters")
        for name, values in record.metrics["perplexity"].items():
            print(f"perplexity {name}: {values['perplexity']:.3f} ({values['tokens']:,} tokens)")
        print(f"metrics: {folder / 'metrics.json'}")
    return 0
