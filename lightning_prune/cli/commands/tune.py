"""``lightning-prune tune``: choose a method's options on held-out calibration samples."""

import csv
import io
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import PositiveInt
from torch.utils.tensorboard import SummaryWriter

from lightning_prune.cli.parser import with_method_help
from lightning_prune.runs.build import RunBuilder, build
from lightning_prune.runs.tune import Tuned, check_tunable, log_kept, log_trial, tune, tuned_config
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import check_writable, writable, write_text

DESCRIPTION = (
    "Choose refit, allocation, normalisation, protection and prior of a method that ranks groups by the loss on an "
    "eighth of the calibration set, which is held out: one calibration, then decisions from its scores. Takes the "
    "options of fit. A temperature of 0 leaves priors out. Example: lightning-prune tune --method hgsp_taylor --output "
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
                f"--output: '{file}' exists. Choose another name, give --overwrite, or go on with its trials: --resume."
            )
    check_writable(output.parent, "--output")
    configuration = yaml.safe_load(cli.resolved_config)
    found: Tuned | None = None
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(writable(output.parent, "--output"))
        output.parent.mkdir(parents=True, exist_ok=True)
        for found in tune(
            configuration,
            build,
            cli.datamodule,
            Path(folder),
            cli.option("trials"),
            kept,
            cli.option("resume"),
            cli.model.progress,
        ):
            if len(found.trials) == 1:  # what an earlier search left stays until there is something to show
                shutil.rmtree(events, ignore_errors=True)
                writer = stack.enter_context(SummaryWriter(str(events)))
                print(f"dense model: loss {found.dense_loss:.4f} on {found.samples} held-out calibration samples")
            log_trial(writer, found)
            last = found.trials[-1]
            mark = "  best so far" if found.best is last else ""
            what = _text(last.options)
            print(f"{len(found.trials):3}  loss {last.loss:.4f}  {last.seconds:6.1f} s  {what}{mark}", flush=True)
    assert found is not None
    with writable(output.parent, "--output"):
        log_kept(events, found)
        write_text(table, _table(found))
        write_text(output, tuned_config(configuration, found))
    print(f"\nbest: loss {found.best.loss:.4f} with {_text(found.best.options)}")
    print(f"configuration: {output}   trials: {table}, {kept}   TensorBoard: {events}")
    return 0


def _text(options: dict[str, object]) -> str:
    return ", ".join(f"{name} {'auto' if value is None else value}" for name, value in options.items())


def _table(found: Tuned) -> str:
    names = list(found.trials[0].options)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *names, "held_out_loss", "seconds"])
    for number, trial in enumerate(found.trials, 1):
        values = [trial.options[name] for name in names]
        writer.writerow([number, *values, trial.loss, round(trial.seconds, 1)])
    return text.getvalue()
