"""What the commands' own parsers share, and ``--quiet`` and ``--json``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_prune.runs.config_files import shipped_methods
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import finite

HELP = ("-h", "--help")
RESUME: dict[str, Any] = {
    "action": "store_true",
    "help": "Go on with the newest unfinished run of the same model, calibration set and options, at the first layer "
    "(recover: saved state) that is not finished; the result is that of an undisturbed run.",
}
OUTPUT: dict[str, dict[str, Any]] = {
    "quiet": {"action": "store_true", "help": "Print the last line alone and no progress."},
    "json": {"action": "store_true", "help": "Print the metrics on stdout, all else on stderr."},
}


class PlainParser(argparse.ArgumentParser):
    """Ends a mistake in one message, as every command does, instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message.removeprefix('argument ')}. See {self.prog} --help.")

    def add_model(self) -> None:
        """The checkpoint that a command takes, dense or pruned."""
        self.add_argument(
            "--model",
            "--model.pretrained",
            dest="model",
            required=True,
            metavar="MODEL",
            help="run folder, model folder (dense or pruned), hub id, or 'demo'",
        )


def with_method_help(words: Sequence[str]) -> list[str]:
    """A command line in which ``--help`` beside the name of a shipped method asks for that method's options."""
    if any(word in HELP for word in words):
        for word in words:
            if (method := shipped_methods().get(word.rpartition("=")[2])) is not None:
                return [f"--model.help={method.class_name}"]
    return list(words)


def tell(run: Any, table: str, metrics: dict[str, Any], folder: Path, last: str) -> None:
    """Print a finished run.

    Args:
        run: a ``RunBuilder`` with the options of ``OUTPUT``.
        table: for people.
        metrics: for scripts.
        folder: of the run.
        last: the line that says where things are.
    """
    if run.option("json"):
        print(json.dumps(finite(metrics | {"folder": str(folder)}), indent=2))
    elif run.option("quiet"):
        print(last)
    else:
        print(f"\n{table}\n{last}")
