"""A saved plan, carried out again."""

import os
from pathlib import Path

import torch

from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.checkpoint.write import write_pruned
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import count_parameters
from lightning_prune.models.weights import DTYPES
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import check_writable, writable


def apply(plan: PruningPlan | str | Path, model: str | Path, output: str | Path, *, verbose: bool = True) -> Path:
    """Apply a saved plan again, without calibrating: byte for byte the weights that the run wrote.

    Args:
        plan: of a run, or its ``plan.json``.
        model: the dense model that the plan was made for: folder, hub id, or ``demo``.
        output: folder to write, new or empty; also what is returned.
        verbose: print where the checkpoint is.

    Raises:
        UserError: not a plan of this model, one whose method changed the weights it kept, or ``output`` is taken.
    """
    if not str(output).strip():
        raise UserError("--output is empty. Give a new or an empty folder.")
    folder = Path(output).absolute()
    if not isinstance(plan, PruningPlan):
        plan = PruningPlan.load(Path(plan))
    if plan.weights_updated:
        raise UserError(
            f"--plan: the method '{plan.method}' also changed the weights it kept, so the plan alone cannot make its "
            "checkpoint again. Copy the run's pruned/ folder instead."
        )
    with writable(folder, "--output"):
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"--output: '{folder}' exists and is not an empty folder. Give a new or an empty one.")
    check_writable(folder, "--output")
    if getattr(torch, plan.dtype, None) not in DTYPES.values():
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
        raise UserError(f"--plan: found dtype '{plan.dtype}', in which no checkpoint is written. Allowed: {allowed}.")
    # Everything that can be wrong is noticed before the weights are read.
    opened = Checkpoint.open(str(model))
    opened.check(plan.keep == "whole")
    if (count := count_parameters(opened.meta)) != plan.parameters["dense"]:
        raise UserError(
            f"--model: '{model}' has {count:,} parameters, the plan was made for a model with "
            f"{plan.parameters['dense']:,} ('{plan.base_model}'). Give that model."
        )
    write_pruned(opened, plan, lambda layer: {}, folder)
    if verbose:
        print(f"pruned model: {output}")
    return Path(output)
