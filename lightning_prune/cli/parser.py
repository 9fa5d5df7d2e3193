"""What the commands' own parsers share, and ``--quiet`` and ``--json``."""

import argparse
import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_prune.runs.config_files import shipped_methods
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import finite

RESUME: dict[str, Any] = {
    "action": "store_true",
    "help": "Go on with the newest unfinished run of the same model, calibration set and options, at the first layer "
    "(recover: saved state) that is not finished; the result is that of an undisturbed run. Placement and the spelling "
    "of paths may differ, of fit also the batch sizes.",
}
OUTPUT: dict[str, dict[str, Any]] = {
    "quiet": {"action": "store_true", "help": "Print the last line alone and no progress."},
    "json": {"action": "store_true", "help": "Print the metrics on stdout, all else on stderr."},
}


def some_path(text: str) -> Path:
    """A path as an option's value, of which something may be there or not."""
    if not text.strip():
        raise argparse.ArgumentTypeError("found nothing; give a path")  # it would be the working folder
    try:
        os.stat(text)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", errno.EINVAL) in (errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP):
            why = getattr(error, "strerror", None) or error
            raise argparse.ArgumentTypeError(f"'{text[:200]}' cannot be a path ({why})") from None
    return Path(text)


def _model_name(text: str) -> str:
    if not text.strip():
        raise UserError("--model is empty. Give a run folder, a model folder, a hub id or 'demo'.")
    some_path(text)  # a hub id has the form of one
    return text


class PlainParser(argparse.ArgumentParser):
    """Ends a mistake in one message, as every command does, instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise a mistake in the arguments as a UserError."""
        raise UserError(f"{message.removeprefix('argument ')}. See {self.prog} --help.")

    def add_model(self) -> None:
        """The checkpoint that a command takes, dense or pruned."""
        text = "run folder, model folder (dense or pruned), hub id, or 'demo'"
        names = ("--model", "--model.pretrained")
        self.add_argument(*names, dest="model", type=_model_name, required=True, metavar="MODEL", help=text)


def with_method_help(words: Sequence[str]) -> list[str]:
    """A command line in which ``--help`` with the name of a shipped method shows that method's options."""
    if not {"-h", "--help"}.isdisjoint(words):
        for word in words:
            if (method := shipped_methods().get(word.rpartition("=")[2])) is not None:
                own = ", ".join(f"{name} {value}" for name, value in method.options.items())
                print(f"{method.name} is {method.class_name} with {own or 'its defaults'}. {method.sentence}")
                print("Options of the text and the trainer: lightning-prune fit --help.\n")
                return [f"--model.help={method.class_name}"]
    return list(words)


def tell(run: Any, table: str, metrics: dict[str, Any], folder: Path, last: str = "") -> None:
    """Print a finished run: a ``table`` for people, ``metrics`` for scripts, the ``last`` line, by default where the
    pruned model is. ``run`` is a ``RunBuilder`` with the options of ``OUTPUT``; of several processes the first prints.
    """
    if not run.trainer.is_global_zero:
        return
    last = last or f"pruned model: {folder / 'pruned'}"
    if run.option("json"):
        print(json.dumps(finite(metrics | {"folder": str(folder)}), indent=2))
    else:
        print(last if run.option("quiet") else f"\n{table}\n{last}")
