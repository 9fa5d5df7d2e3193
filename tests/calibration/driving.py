"""A calibration loop driven by hand, as the trainer drives it, on a layered model in memory."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from lightning_prune.calibration.loop import CalibrationLoop
from lightning_prune.calibration.passes import Batch, Pass, Setting
from lightning_prune.calibration.results import Results
from lightning_prune.calibration.stream_checkpoints import StreamCheckpoints
from lightning_prune.models.layered import LayeredModel


def drive(
    passes: Sequence[Pass],
    model: LayeredModel,
    tokens: Tensor,
    scratch: Path,
    *,
    batch_size: int = 2,
    padding: int = 0,
    folder: Path | None = None,
    streams: bool = False,
    stop_after: int | None = None,
) -> CalibrationLoop:
    """Take ``passes`` over ``tokens`` ``[N, L]`` and, after them, ``padding`` samples of weight 0.

    ``folder`` keeps results, with ``streams`` residual streams too. ``stop_after``: so many steps; what is open stays
    open, as where a process is killed.
    """
    samples = len(tokens)
    padded = torch.cat([tokens, tokens[:1].expand(padding, -1)])
    weight = torch.cat([torch.ones(samples), torch.zeros(padding)])
    setting = Setting(model, len(padded), samples, batch_size, tokens.shape[1], scratch, nullcontext)
    loop = CalibrationLoop(passes, setting, Results(folder), StreamCheckpoints(folder if streams else None))
    for _ in range(len(loop.remaining[:stop_after])):
        reads = loop.reads
        loop.start()
        for rows in setting.batches() if reads else ():
            parts = (padded[rows], weight[rows], torch.arange(len(padded))[rows])
            loop.batch(Batch(*(part.to(model.device) for part in parts), rows))
        loop.finish()
    return loop
