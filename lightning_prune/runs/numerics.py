"""What to do about NaN and infinite values, said where the precision in use is known."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import lightning as L
import torch

from lightning_prune.methods.base import PruningMethod
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import open_layered


@contextmanager
def numerical_advice(trainer: L.Trainer, model: PruningMethod) -> Iterator[None]:
    """Complete the message of numerical trouble: bad weights are named, else a precision that is not yet in use.

    Raises:
        FloatingPointError: the one that was raised, with advice.
    """
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{error} {_advice(str(trainer.precision), model)}") from error


def _advice(precision: str, model: PruningMethod) -> str:
    if bad := _bad_weight(model.checkpoint):
        return (
            f"The weights of '{model.pretrained}' themselves hold NaN or infinite values, first in {bad}: give others."
        )
    if precision.startswith("16"):
        return "Use --trainer.precision bf16-true or 32-true."
    if precision.startswith("bf16"):
        return "Use --trainer.precision 32-true."
    return (
        f"Precision {precision} is in use already, so the values lie outside its range: look at the model and the text."
    )


def _bad_weight(checkpoint: Checkpoint) -> str | None:
    """The first parameter of the checkpoint that is not finite."""
    with closing(open_layered(checkpoint, None, torch.device("cpu"))) as model:
        named = dict(model.net.named_parameters())
        for name in model.outside:
            if not bool(torch.isfinite(named[name]).all()):
                return str(name)
        for index, names in enumerate(model.layer_names):
            with model.layer(index) as layer:
                for inner, name in names.items():
                    if not bool(torch.isfinite(layer.get_parameter(inner)).all()):
                        return str(name)
    return None
