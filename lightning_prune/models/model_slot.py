"""The one open model, shared by calibration and evaluation."""

from typing import get_args

import torch

from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import LayeredModel, Onload, choose_onload, open_layered
from lightning_prune.support.errors import UserError
from lightning_prune.support.timing import Seconds

DTYPES = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
    "64-true": torch.float64,
}


def load_dtype(precision: str) -> torch.dtype:
    """The dtype that weights are read into for a trainer's precision; mixed precisions keep fp32 weights. Raises
    UserError for a precision that is not supported."""
    if precision not in DTYPES:
        raise UserError(f"--trainer.precision: '{precision}' is not supported. Choose one of {', '.join(DTYPES)}.")
    return DTYPES[precision]


class ModelSlot:
    """Holds at most one open model: opening another one closes it.

    Args:
        onload: ``model``, ``layer``, or ``auto``, which takes what fits; ``placement`` is what it took for the first.
        seconds: where the time for opening models is counted.
    """

    def __init__(self, onload: str, seconds: Seconds) -> None:
        if onload not in ("auto", *get_args(Onload)):
            raise UserError(f"--model.onload: found '{onload}'; allowed: auto, model, layer.")
        self.onload, self.seconds = onload, seconds
        self.placement: Onload | None = None
        self._model: LayeredModel | None = None
        self._opened: Checkpoint | None = None

    @property
    def model(self) -> LayeredModel:
        """The model that is open now."""
        assert self._model is not None, "no model is open; fit and test open it: call them through a Trainer"
        return self._model

    def open(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> LayeredModel:
        """Open ``checkpoint`` unless it is open already."""
        if self._opened is not checkpoint:
            self.close()
            with self.seconds.measure("load"):
                placement = choose_onload(self.onload, checkpoint, dtype, device)
                self.placement = self.placement or placement
                self._model = open_layered(checkpoint, dtype, device, placement)
                if placement == "model":
                    self._model.load_all()
            self._opened = checkpoint
        return self.model

    def close(self) -> None:
        """Drop the open model, if there is one."""
        if self._model is not None:
            self._model.close()
        self._model = self._opened = None
