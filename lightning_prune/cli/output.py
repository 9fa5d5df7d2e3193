"""``--quiet`` and ``--json``: what a command that makes a run says of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prune.support.files import finite


@dataclass(frozen=True)
class Output:
    """How a finished run is told.

    Attributes:
        quiet: the folder's last line alone, and no bar.
        as_json: ``metrics.json`` with ``folder`` on stdout, and nothing else there.
    """

    quiet: bool = False
    as_json: bool = False

    @classmethod
    def take(cls, argv: Sequence[str]) -> tuple[list[str], "Output"]:
        """The command line without both options, and what they ask for."""
        words = [word for word in argv if word not in ("--quiet", "--json")]
        found = cls("--quiet" in argv, "--json" in argv)
        if found.quiet:
            words += ["--trainer.enable_progress_bar", "false"]
        return words, found

    def tell(self, table: str, metrics: dict[str, Any], folder: Path, last: str) -> None:
        """Print the run.

        Args:
            table: for people.
            metrics: for scripts.
            folder: of the run.
            last: the line that says where things are.
        """
        if self.as_json:
            print(json.dumps(finite(metrics | {"folder": str(folder)}), indent=2))
        elif self.quiet:
            print(last)
        else:
            print(f"\n{table}\n{last}")
