"""Measurements of a finished run for a method that decides again, after a check that they are of this model."""

import numpy as np
import torch

from lightning_prune.checkpoint.scores import Scores
from lightning_prune.methods.base import PruningMethod
from lightning_prune.methods.measurement import SavedMeasurement
from lightning_prune.methods.scores import group_scores, layer_scores
from lightning_prune.models.families import layer_structures
from lightning_prune.runs.folder import FinishedRun
from lightning_prune.runs.records import as_dict
from lightning_prune.support.errors import UserError

MEASURING = ("calibrate", "finish layers")  # phases that reading the scores saves


def reuse(method: PruningMethod, run: FinishedRun) -> None:
    """Let ``method`` decide from what ``run`` measured.

    Raises:
        UserError: the scores are not those of this model's units, or the method finds its own facts missing.
    """
    try:
        _check_units(run.scores, method)
    except ValueError as error:
        raise UserError(
            f"{run.option}: '{run.path / 'scores.csv'}' {error} '{method.pretrained}' now is another model, or the "
            "file was changed. Run fit again."
        ) from None
    spent = {phase: seconds for phase, seconds in run.metrics.seconds.items() if phase in MEASURING}
    saved = SavedMeasurement(
        scores=run.scores,
        details=as_dict(run.details),
        calibration=run.calibration_facts if method.needs_calibration else None,
        run=run.details.measured_by or str(run.path),  # a decision of a decision names the run that calibrated
        seconds=run.metrics.method.measured_seconds or spent,
    )
    try:
        method.reuse(saved)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{run.option}: '{run.path / 'method.json'}' lacks what {method.method} measured "
            f"({type(error).__name__}: {error}). Run fit again."
        ) from None


def _check_units(scores: Scores, method: PruningMethod) -> None:
    """Raise ValueError unless the table lists every unit of the model with its cost."""
    layers = method.arranged(layer_structures(method.checkpoint.meta))
    if scores.whole_layers:
        expected = layer_scores(torch.ones(len(layers)), [view.cost for view in layers])
    else:
        expected = group_scores(layers, kinds=method.kinds(layers))
    if len(expected.unit) != len(scores.unit):
        raise ValueError(f"lists {len(scores.unit):,} units, the model has {len(expected.unit):,}.")
    for name in ("layer", "block", "unit", "cost"):
        theirs, ours = getattr(scores, name), getattr(expected, name)
        if (wrong := theirs != ours).any():
            row = int(np.argmax(wrong))
            raise ValueError(f"says in row {row + 1} that {name} is {theirs[row]}, the model's is {ours[row]}.")
