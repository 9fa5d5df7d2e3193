"""``lightning-prune test``: perplexity of any model, dense or pruned."""

from lightning_prune.cli.parser import OUTPUT, tell
from lightning_prune.evaluation.perplexity import Evaluation
from lightning_prune.runs.build import RunBuilder
from lightning_prune.runs.run import evaluate_and_record

DESCRIPTION = (
    "Measure the perplexity of a dense or pruned model with the protocol of the pruning runs. Example: lightning-prune "
    "test --model.pretrained logs/wanda/version_0/pruned --data.eval_datasets '[wikitext2, ptb]'"
)


def main(argv: list[str]) -> int:
    """Run the command, print one line per evaluation set, and write ``metrics.json``."""
    run = RunBuilder(argv, Evaluation, "test", DESCRIPTION, OUTPUT)
    folder, metrics = evaluate_and_record(run.trainer, run.model, run.datamodule, run.resolved_config)
    lines = [f"{run.model.pretrained}: {metrics['parameters']:,} parameters"]
    for name, values in metrics["perplexity"].items():
        tokens = f"{values['tokens']:,} tokens in windows of {metrics['evaluation'][name]['seq_len']}"
        lines.append(f"perplexity {name}: {values['perplexity']:.3f} ({tokens})")
    tell(run, "\n".join(lines), metrics, f"metrics: {folder / 'metrics.json'}", folder)
    return 0
