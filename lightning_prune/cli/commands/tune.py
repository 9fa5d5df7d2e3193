"""``lightning-prune tune``: choose a method's options on held-out calibration samples."""

import argparse
import csv
import io
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import yaml
from torch.utils.tensorboard import SummaryWriter

from lightning_prune.cli.experiment import build
from lightning_prune.cli.lightning_cli import PruneCLI
from lightning_prune.methods.base import PruningMethod
from lightning_prune.runs.tune import Tuned, check_tunable, log_kept, log_trial, tune, tuned_config
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import check_writable, writable, write_text


def main(argv: list[str]) -> int:
    """Print every trial, then write the best options as a configuration and all trials as a table beside it."""
    own, words = _parser().parse_known_args(argv)
    cli = PruneCLI(words, PruningMethod, subclasses=True, command="tune")
    check_tunable(cli.model)
    output: Path = own.output.expanduser()
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output: found '{output}'; a configuration's name ends in .yaml.")
    table, kept, events = output.with_suffix(".csv"), output.with_suffix(".json"), output.with_suffix(".tensorboard")
    for file in (output, table, kept):
        if file.exists() and not own.overwrite and not own.resume:
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
            configuration, build, cli.datamodule, Path(folder), own.trials, kept, own.resume, cli.model.progress
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("tuned.yaml"))
    parser.add_argument("--trials", type=_trials, default=24)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    return parser


def _trials(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise UserError(f"--trials: found '{text}'; give a whole number from 1 to 10000.")
    return int(text)
