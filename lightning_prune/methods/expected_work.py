"""What the progress bar is told of the work to come."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from lightning_prune.calibration.driver import CALIBRATING, REFITTING, CalibrationDriver
from lightning_prune.calibration.passes import Pass
from lightning_prune.checkpoint.cut import unpruned
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.support.progress import Progress

WRITING = "writing the pruned model"
LAYER_TO_WRITE = 1000.0  # about what cutting and writing a layer costs, in tokens through it
FEW_PASSES = 3  # forwards that calibrating may cost, as long as the passes are not known


class Method(Protocol):
    """What of a method decides its work."""

    progress: Progress
    driver: CalibrationDriver
    layers: Any
    steps: int
    writes: bool

    @property
    def needs_calibration(self) -> bool:
        """Whether it reads data."""

    def refit_passes(self, kept: list[LayerPlan], held_out: Callable[[], torch.Tensor]) -> list[Pass]:
        """See ``PruningMethod``."""


def expect_roughly(method: Method, data: CalibrationDataModule) -> None:
    """What follows the evaluation of the dense model, before the passes are known."""
    if not method.progress.shown:
        return
    layers = len(method.layers)
    if method.needs_calibration:
        method.progress.expect(CALIBRATING, float(FEW_PASSES * layers * data.num_samples * data.seq_len))
    if method.writes:
        method.progress.expect(WRITING, LAYER_TO_WRITE * layers)


def expect_passes(method: Method, passes: list[Pass]) -> None:
    """The same from the passes, as if every unit were kept."""
    if not method.progress.shown:
        return
    refits = method.refit_passes(unpruned(method.layers), lambda: torch.zeros(0))
    for phase, of in ((CALIBRATING, passes), (REFITTING, refits)):
        if of:
            method.progress.expect(phase, method.steps * method.driver.work(of))
    if method.writes:
        method.progress.expect(WRITING, LAYER_TO_WRITE * len(method.layers))
