"""``lightning-prune fit``: one model, one method, one run folder."""

from lightning_prune.cli.parser import OUTPUT, RESUME, tell, with_method_help
from lightning_prune.runs.build import RunBuilder
from lightning_prune.runs.run import prune_and_record
from lightning_prune.runs.verdict import summary_table

DESCRIPTION = (
    "Calibrate, prune, save and evaluate one model with one method. 'lightning-prune methods' lists the methods, and "
    "'lightning-prune fit --method wanda --help' the options of one. Examples: lightning-prune fit --method wanda; "
    "lightning-prune fit --method wanda --model.pretrained path/to/llama --model.pruning_ratio 0.3 --data.dataset "
    "wikitext2"
)


def main(argv: list[str]) -> int:
    """Run the command and print the summary and where the pruned model is."""
    run = RunBuilder(with_method_help(argv), description=DESCRIPTION, options={"resume": RESUME} | OUTPUT)
    resume, config = run.option("resume"), run.resolved_config
    folder, metrics = prune_and_record(run.trainer, run.model, run.datamodule, config, resume=resume)
    tell(run, summary_table(run.model.label, metrics), metrics, folder)
    return 0
