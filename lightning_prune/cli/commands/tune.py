"""``lightning-prune tune``: choose a method's options on held-out calibration samples."""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import PositiveInt
from torch.utils.tensorboard import SummaryWriter

from lightning_prune.cli.parser import with_method_help
from lightning_prune.comparison.exports import csv_text
from lightning_prune.runs.build import RunBuilder
from lightning_prune.runs.tune import Tuned, check_tunable, log_kept, log_trial, tune, tuned_config
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import check_writable, made, writable, write_text

DESCRIPTION = (
    "Choose refit, allocation, normalisation, protection and prior of a method that ranks groups by the "
    "distance from the dense model, KL(dense ‖ pruned), on an eighth of the calibration set, which is held out: one "
    "calibration, then decisions from its scores. Takes the "
    "options of fit. A temperature of 0 omits the priors. Example: lightning-prune tune --method hgsp_taylor --output "
    "tuned.yaml"
)
OPTIONS: dict[str, dict[str, Any]] = {
    "output": {
        "default": "tuned.yaml",
        "help": "Configuration to write with the best options; all trials go beside it (.csv, .json, .tensorboard).",
    },
    "trials": {"type": PositiveInt, "default": 24, "help": "Options to try."},
    "resume": {"action": "store_true", "help": "Go on with the trials beside --output, or add more of them."},
    "overwrite": {"action": "store_true", "help": "Replace what is at --output."},
}


def main(argv: list[str]) -> int:
    """Print every trial, then write the best options as a configuration and all trials as a table beside it."""
    cli = RunBuilder(with_method_help(argv), command="tune", description=DESCRIPTION, options=OPTIONS)
    check_tunable(cli.model)
    output: Path = Path(cli.option("output")).expanduser()
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output: found '{output}'; a configuration's name ends in .yaml.")
    table, kept, events = output.with_suffix(".csv"), output.with_suffix(".json"), output.with_suffix(".tensorboard")
    for file in (output, table, kept):
        if file.exists() and not cli.option("overwrite") and not cli.option("resume"):
            raise UserError(
                f"--output: '{file}' exists. Choose another name, give --overwrite, or --resume to continue it."
            )
    check_writable(output.parent, "--output")
    configuration = yaml.safe_load(cli.resolved_config)
    tuned: Tuned | None = None
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(writable(output.parent, "--output"))
        stack.enter_context(made(output.parent))
        trials, again, progress = cli.option("trials"), cli.option("resume"), cli.model.progress
        for tuned in tune(configuration, cli.datamodule, Path(folder), trials, kept, again, progress):
            if len(tuned.trials) == 1:  # what an earlier search left stays until there is something to show
                shutil.rmtree(events, ignore_errors=True)
                writer = stack.enter_context(SummaryWriter(str(events)))
                print(f"dense model: loss {tuned.dense_loss:.4f} on {tuned.samples} held-out calibration samples")
            log_trial(writer, tuned)
            last = tuned.trials[-1]
            text = _text(last.options) + ("  best so far" if tuned.best is last else "")
            print(
                f"{len(tuned.trials):3}  KL {last.divergence:.4f}  loss {last.loss:.4f}  {last.seconds:6.1f} s  {text}",
                flush=True,
            )
    assert tuned is not None
    with writable(output.parent, "--output"):
        log_kept(events, tuned)
        measured = ("divergence", "loss")
        rows = [
            one.options
            | {f"held_out_{name}": getattr(one, name) for name in measured}
            | {"seconds": round(one.seconds, 1)}
            for one in tuned.trials
        ]
        write_text(table, csv_text([{"trial": number} | row for number, row in enumerate(rows, start=1)]))
        write_text(output, tuned_config(configuration, tuned))
    print(f"\nbest: KL {tuned.best.divergence:.4f} with {_text(tuned.best.options)}")
    print(f"configuration: {output}   trials: {table}, {kept}   TensorBoard: {events}")
    return 0


def _text(options: dict[str, object]) -> str:
    return ", ".join(f"{name} {'auto' if value is None else value}" for name, value in options.items())
