"""A walk driven by hand, as the trainer drives it, on a layered model in memory."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from lightning_prune.calibration.loop import Walk
from lightning_prune.calibration.passes import Batch, Pass, Setting
from lightning_prune.calibration.results import Findings
from lightning_prune.calibration.stream_checkpoints import Waypoints
from lightning_prune.models.layered import LayeredModel


def drive(
    passes: Sequence[Pass],
    model: LayeredModel,
    tokens: Tensor,
    scratch: Path,
    *,
    batch_size: int = 2,
    padding: int = 0,
    findings: Findings | None = None,
    waypoints: Waypoints | None = None,
    stop_after: int | None = None,
) -> Walk:
    """Take ``passes`` over ``tokens`` ``[N, L]`` and, behind them, ``padding`` samples of weight 0.

    ``stop_after``: so many steps; what is open stays open, as where a process is killed.
    """
    samples = len(tokens)
    padded = torch.cat([tokens, tokens[:1].expand(padding, -1)])
    weight = torch.cat([torch.ones(samples), torch.zeros(padding)])
    setting = Setting(model, len(padded), samples, batch_size, tokens.shape[1], scratch, nullcontext)
    walk = Walk(passes, setting, Findings() if findings is None else findings, waypoints)
    for number in walk.open_steps()[:stop_after]:
        walk.start(number)
        for rows in setting.batches() if walk.steps[number][0].reads else ():
            walk.batch(number, Batch(padded[rows], weight[rows], torch.arange(len(padded))[rows], rows))
        walk.finish(number)
    return walk
