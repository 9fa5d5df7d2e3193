"""The learning rate over a run that ends by steps or by time, whichever comes first."""

import math

import lightning as L
from lightning.pytorch.callbacks import Timer


def cosine_with_warmup(progress: float, warmup: float) -> float:
    """Factor of the peak learning rate: linear up to 1 at ``warmup``, then half a cosine down to 0 at 1.

    Args:
        progress: share of the run that is done, 0 … 1.
        warmup: share of the run, 0 … 1 (1 excluded).
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def progress_of(trainer: L.Trainer, steps_done: float) -> float:
    """Share of the run that is done: of its steps, or of ``--trainer.max_time`` where that ends first."""
    total = trainer.estimated_stepping_batches
    done = steps_done / total if math.isfinite(total) and total > 0 else 0.0
    timer = timer_of(trainer)
    if timer is not None and (left := timer.time_remaining()) is not None:
        spent = timer.time_elapsed()
        done = max(done, spent / max(spent + left, 1e-9))
    return min(done, 1.0)


def timer_of(trainer: L.Trainer) -> Timer | None:
    """The callback that ``--trainer.max_time`` makes."""
    return next((one for one in trainer.callbacks if isinstance(one, Timer)), None)  # type: ignore[attr-defined]
