"""``lightning-prune test``: perplexity of any model, dense or pruned, and its distance from another one."""

from typing import Any

from lightning_prune.cli.parser import OUTPUT, tell
from lightning_prune.evaluation.perplexity import Evaluation
from lightning_prune.runs.build import RunBuilder
from lightning_prune.runs.run import evaluate_and_record
from lightning_prune.runs.verdict import comparison_rows

DESCRIPTION = (
    "Measure the perplexity of a dense or pruned model with the protocol of the pruning runs. Example: lightning-prune "
    "test --model.pretrained logs/wanda/version_0/pruned --dense demo --data.eval_datasets '[wikitext2, ptb]'"
)
DENSE: dict[str, dict[str, Any]] = {
    "dense": {
        "type": str,
        "default": "",
        "metavar": "MODEL",
        "help": "A model with the same tokenizer to compare with: KL divergence, agreement of the most probable token, "
        "expected acceptance, and continuations of the same prompts.",
    }
}


def main(argv: list[str]) -> int:
    """Run the command, print one line per evaluation set, and write ``metrics.json``."""
    run = RunBuilder(argv, Evaluation, "test", DESCRIPTION, OUTPUT | DENSE)
    dense = run.option("dense")
    folder, metrics = evaluate_and_record(run.trainer, run.model, run.datamodule, run.resolved_config, dense)
    lines = [f"{run.model.pretrained}: {metrics['parameters']:,} parameters"]
    for name, values in metrics["perplexity"].items():
        tokens = f"{values['tokens']:,} tokens in windows of {metrics['evaluation'][name]['seq_len']}"
        other = f", dense {values['dense']:.3f}" if "dense" in values else ""
        lines.append(f"perplexity {name}: {values['perplexity']:.3f}{other} ({tokens})")
    lines += [f"{what}: {value}" for what, value in comparison_rows(metrics)]
    tell(run, "\n".join(lines), metrics, folder, f"metrics: {folder / 'metrics.json'}")
    return 0
