"""What to do about NaN and infinite values, said where the precision in use is known."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch

from lightning_prune.methods.base import PruningMethod
from lightning_prune.models.layered import LayeredModel, open_layered


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
    bad = _bad_weight(model)
    if bad is not None:
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


def _bad_weight(model: PruningMethod) -> str | None:
    """The first parameter of the checkpoint that is not finite."""
    opened = open_layered(model.pretrained, None, torch.device("cpu"))
    try:
        for name, weight in _parameters(opened):
            if not bool(torch.isfinite(weight).all()):
                return name
    finally:
        opened.close()
    return None


def _parameters(model: LayeredModel) -> Iterator[tuple[str, torch.Tensor]]:
    named = dict(model.net.named_parameters())
    yield from ((name, named[name]) for name in model.outside)
    for index, names in enumerate(model.layer_names):
        with model.layer(index) as layer:
            for inner, name in names.items():
                yield name, layer.get_parameter(inner)
