"""Trials of ``tune``, kept in a file after every one of them, so that a search that was killed goes on."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_prune.runs.resume import Facts, differences
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import finite, write_json
from lightning_prune.support.validation import read_json


@dataclass(frozen=True)
class Trial:
    """What was tried, and what came of it.

    Attributes:
        options: of the method.
        loss: mean token loss in nats on the held-out samples.
        seconds: deciding, refitting and measuring took.
        kept: by block, the kept fraction of every layer.
        move: which shift of budget it is; empty for options.
    """

    options: dict[str, Any]
    loss: float
    seconds: float
    kept: dict[str, list[float]]
    move: str = ""


@dataclass
class Trials:
    """All trials so far, in order, and what they were made from.

    Attributes:
        facts: options and fingerprints that a search which goes on must share.
        dense_loss: of the dense model on the held-out samples; None before it was measured.
        samples: held out.
    """

    facts: Facts
    dense_loss: float | None = None
    samples: int = 0
    trials: list[Trial] = field(default_factory=list)

    def known(self, options: Mapping[str, Any]) -> Trial | None:
        """The trial with these options."""
        return next((trial for trial in self.trials if trial.options == options), None)

    def write(self, file: Path) -> None:
        """Keep them, whole or not at all."""
        write_json(file, finite(asdict(self)))


def read_trials(file: Path, facts: Facts) -> Trials:
    """Those of a search that was killed.

    Raises:
        UserError: there are none, or they were made from something else; says what differs.
    """
    if not file.is_file():
        raise UserError(f"--resume: no trials in '{file}'. Leave --resume out to begin anew.")
    found = read_json(file, Trials, "--resume", "Leave --resume out and give --overwrite to begin anew.")
    now = json.loads(json.dumps(finite(facts)))
    if different := differences(found.facts, now):
        raise UserError(
            f"--resume: the trials in '{file}' were made from something else: {'; '.join(different)}. Give what they "
            "were made from, or --overwrite in place of --resume."
        )
    return found
