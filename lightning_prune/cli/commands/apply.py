"""``lightning-prune apply``: carry out a saved plan again, without calibrating."""

import argparse
import os
from pathlib import Path

from lightning_prune.cli.parser import PlainParser
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import cannot_write, check_writable


def main(argv: list[str]) -> int:
    """Cut ``--model`` as ``--plan`` says and write the checkpoint to ``--output``.

    The weights are byte for byte those that the run which made the plan wrote.

    Raises:
        UserError: the plan is not one, changed weights, or belongs to another model; or the output folder
            holds something already.
    """
    arguments = _parser().parse_args(argv)

    # After the arguments, so that --help does not wait for torch.
    import torch

    from lightning_prune.checkpoint.cut import layout_of
    from lightning_prune.checkpoint.model_card import model_card
    from lightning_prune.checkpoint.plan import PruningPlan
    from lightning_prune.checkpoint.pruned import open_pruned
    from lightning_prune.checkpoint.write import write_checkpoint
    from lightning_prune.models.checkpoint import Checkpoint
    from lightning_prune.models.families import count_parameters

    plan = PruningPlan.load(arguments.plan)
    if plan.weights_updated:
        raise UserError(
            f"--plan: the method '{plan.method}' also changed the weights it kept, so '{arguments.plan}' alone "
            f"cannot make its checkpoint again. Copy the run's pruned/ folder instead."
        )
    _check_output(arguments.output)
    dtype = getattr(torch, plan.dtype, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"--plan: dtype '{plan.dtype}' is not known. Allowed: float32, bfloat16, float16.")

    # Everything that can be wrong is found before the weights are read.
    dense = Checkpoint.open(arguments.model)
    found, expected = count_parameters(dense.meta), plan.parameters["dense"]
    if found != expected:
        raise UserError(
            f"--model: '{arguments.model}' has {found:,} parameters, the plan was made for a model with "
            f"{expected:,} ('{plan.base_model}'). Give that model."
        )
    pruned = open_pruned(dense, plan)
    card = model_card(plan, layout_of(pruned.config), base=dense)
    write_checkpoint(pruned, arguments.output, beside=dense, card=card)
    print(f"pruned model: {arguments.output}")
    return 0


def _check_output(output: Path) -> None:
    try:
        taken = os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir()))
    except OSError as error:
        raise cannot_write(output, "--output", error) from None
    if taken:
        raise UserError(f"--output: '{output}' exists and is not an empty folder. Give a new or an empty one.")
    check_writable(output, "--output")


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="lightning-prune apply",
        description="Carry out a saved pruning plan on its base model. No calibration, no training data; the "
        "weights are byte for byte those of the run that made the plan.",
        epilog="example: lightning-prune apply --plan logs/hgsp/version_0/plan.json --model demo --output pruned-demo",
    )
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE", help="plan.json of a run folder")
    parser.add_argument(
        "--model",
        "--model.pretrained",
        dest="model",
        required=True,
        metavar="MODEL",
        help="the dense model the plan was made for: a Hugging Face folder, a hub id, or 'demo'",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where to write the checkpoint: new or empty"
    )
    return parser
