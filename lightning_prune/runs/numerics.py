"""What to do about NaN and infinite values, said where the precision in use is known."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import lightning as L
import torch

from lightning_prune.methods.base import PruningMethod
from lightning_prune.models.checkpoint import Checkpoint


@contextmanager
def numerical_advice(trainer: L.Trainer, model: PruningMethod) -> Iterator[None]:
    """Complete the message of numerical trouble: bad weights are named, else a precision that is not yet in use.

    Raises:
        FloatingPointError: the one that was raised, with advice.
    """
    try:
        yield
    except FloatingPointError as error:
        precision, name = str(trainer.precision), model.pretrained
        if bad := _bad_weight(model.checkpoint):
            advice = f"The weights of '{name}' themselves hold NaN or infinite values, first in {bad}: give others."
        elif precision.startswith("16"):
            advice = "Use --trainer.precision bf16-true or 32-true."
        elif precision.startswith("bf16"):
            advice = "Use --trainer.precision 32-true."
        else:
            advice = f"Precision {precision} is in use already, so the values lie outside its range: look at the model "
            advice += "and the text."
        raise FloatingPointError(f"{error} {advice}") from error


def _bad_weight(checkpoint: Checkpoint) -> str | None:
    """The first parameter of the checkpoint that is not finite."""
    with closing(checkpoint.source()) as source:
        for name in source.places:
            if not bool(torch.isfinite(source.read([name], None, torch.device("cpu"))[name]).all()):
                return name
    return None
