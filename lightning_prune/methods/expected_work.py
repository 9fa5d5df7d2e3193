"""What the progress bar is told of the work to come; ``method`` is a ``PruningMethod``, which calls this."""

from typing import Any

import torch

from lightning_prune.calibration.driver import CALIBRATING, REFITTING
from lightning_prune.calibration.passes import Pass
from lightning_prune.checkpoint.cut import unpruned
from lightning_prune.data.datamodule import CalibrationDataModule

WRITING = "writing the pruned model"
LAYER_TO_WRITE = 1000.0  # about what cutting and writing a layer costs, in tokens through it
FEW_PASSES = 3  # forwards that calibrating may cost, as long as the passes are not known


def expect_roughly(method: Any, data: CalibrationDataModule) -> None:
    """What follows the evaluation of the dense model, before the passes are known."""
    if not method.progress.shown:
        return
    layers = len(method.layers)
    if method.needs_calibration:
        method.progress.expect(CALIBRATING, float(FEW_PASSES * layers * data.num_samples * data.seq_len))
    if method.writes:
        method.progress.expect(WRITING, LAYER_TO_WRITE * layers)


def expect_passes(method: Any, passes: list[Pass]) -> None:
    """The same from the passes, as if every unit were kept."""
    if not method.progress.shown:
        return
    refits = method.refit_passes(unpruned(method.layers), lambda: torch.zeros(0))
    for phase, of in ((CALIBRATING, passes), (REFITTING, refits)):
        if of:
            method.progress.expect(phase, method.steps * method.driver.work(of))
    if method.writes:
        method.progress.expect(WRITING, LAYER_TO_WRITE * len(method.layers))
