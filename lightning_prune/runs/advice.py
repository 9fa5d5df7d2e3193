"""What would help where a run cannot go on, said where its precision and options are known."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.methods.base import PruningMethod
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.runs.memory_estimate import advice
from lightning_prune.support.errors import UserError, first_line


@contextmanager
def advice_on_failure(method: PruningMethod, data: CalibrationDataModule) -> Iterator[None]:
    """Complete the messages of numerical trouble and of memory that does not suffice.

    Raises:
        FloatingPointError: the one that was raised. Bad weights are named, else a precision that is not yet in use.
        UserError: in place of an error that says that memory ran out.
    """
    try:
        yield
    except FloatingPointError as error:
        precision = str(method.trainer.precision)
        if bad := _bad_weight(method.checkpoint):
            remedy = f"The weights of '{method.pretrained}' themselves hold NaN or infinite values, first in {bad}: "
            remedy += "give others."
        elif precision.startswith("16"):
            remedy = "Use --trainer.precision bf16-true or 32-true."
        elif precision.startswith("bf16"):
            remedy = "Use --trainer.precision 32-true."
        else:
            remedy = f"Precision {precision} is in use already, so the values lie outside its range: look at the model "
            remedy += "and the text."
        raise FloatingPointError(f"{error} {remedy}") from error
    except (MemoryError, RuntimeError) as error:
        # On the host torch raises a plain RuntimeError.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        remedy = advice(method, data, method.slot.onload)
        raise UserError(f"Out of memory: {first_line(error)[:200]} {remedy}") from error


def _bad_weight(checkpoint: Checkpoint) -> str | None:
    """The first parameter of the checkpoint that is not finite."""
    with closing(checkpoint.source()) as source:
        for name in source.places:
            if not bool(torch.isfinite(source.read([name], None, torch.device("cpu"))[name]).all()):
                return name
    return None
