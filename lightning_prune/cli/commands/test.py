"""``lightning-prune test``: perplexity of any model, dense or pruned."""

from lightning_prune.cli.lightning_cli import PruneCLI
from lightning_prune.cli.output import Output
from lightning_prune.evaluation.perplexity import Evaluation
from lightning_prune.runs.run import evaluate_and_record


def main(argv: list[str]) -> int:
    """Run the command, print one line per evaluation set, and write ``metrics.json``."""
    words, output = Output.take(argv)
    cli = PruneCLI(words, Evaluation, subclasses=False, command="test")
    folder, record = evaluate_and_record(cli.trainer, cli.model, cli.datamodule, cli.resolved_config)
    if cli.trainer.is_global_zero:
        lines = [f"{cli.model.pretrained}: {record.metrics['parameters']:,} parameters"]
        for name, values in record.metrics["perplexity"].items():
            windows = record.metrics["evaluation"][name]["seq_len"]
            lines.append(
                f"perplexity {name}: {values['perplexity']:.3f} ({values['tokens']:,} tokens in windows of {windows})"
            )
        output.tell("\n".join(lines), record.metrics, folder, f"metrics: {folder / 'metrics.json'}")
    return 0
