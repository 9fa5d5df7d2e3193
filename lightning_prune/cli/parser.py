"""The parser of the commands that are not Lightning's."""

import argparse
from typing import NoReturn

from lightning_prune.support.errors import UserError


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
