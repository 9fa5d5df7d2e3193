"""Reads a finished run folder."""

from pathlib import Path
from typing import Any

import yaml

from lightning_prune.comparison.records import Run
from lightning_prune.runs.folder import RunFolder
from lightning_prune.support.errors import UserError


def load_run(folder: Path) -> Run:
    """Read one run folder, its score table too.

    Raises:
        UserError: not the folder of a finished pruning run, or a file in it is not what it should be.
    """
    run = RunFolder.open(folder, "--runs")
    return Run(
        folder=folder,
        metrics=run.metrics,
        calibration=run.calibration,
        environment=run.environment,
        details=run.details,
        units=run.scores,
        options=_options(folder),
        recovery=run.recovery,
    )


def _options(folder: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(RunFolder.read_config(folder, "--runs"))
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"--runs: '{folder / 'config.yaml'}' is not YAML ({problem}).") from None
    model = content.get("model") if isinstance(content, dict) else None
    options = model.get("init_args") if isinstance(model, dict) else None
    return options if isinstance(options, dict) else {}
