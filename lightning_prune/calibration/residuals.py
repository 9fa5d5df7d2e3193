"""One vector per token of every sample, between two layers: the residual stream, or a block's inner activations."""

import contextlib
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from lightning_prune.support.files import temporary
from lightning_prune.support.memory import free_host_bytes

SHARE = 0.25  # of free host memory that one store may take; a larger one is a mapped file


class ResidualStore:
    """``[rows, L, D]`` in host memory (pinned for a GPU), or in a mapped temporary file when that is too large.

    The file loses its name at once, so that nothing is left, however the process ends. Memory is taken at the first
    ``put``.

    Args:
        rows: samples of this process.
        folder: where a temporary file goes.

    Attributes:
        values: all of it; None before the first ``put``.
    """

    def __init__(self, rows: int, folder: Path) -> None:
        self.rows, self.folder = rows, folder
        self.values: Tensor | None = None

    def put(self, rows: slice, values: Tensor) -> None:
        """Keep ``values`` ``[n, L, D]`` of the samples ``rows``; dtype and shape are those of the first ones."""
        if self.values is None:
            self.values = self._new((self.rows, *values.shape[1:]), values.dtype, values.is_cuda)
        self.values[rows].copy_(values.detach(), non_blocking=True)

    def get(self, rows: slice, device: torch.device) -> Tensor:
        """``[n, L, D]`` on ``device``; on the CPU a view that must not be written to."""
        assert self.values is not None, "nothing was put here"
        return self.values[rows].to(device, non_blocking=True)

    def close(self) -> None:
        """Give the memory back."""
        self.values = None

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size <= SHARE * free_host_bytes():
            return torch.empty(shape, dtype=dtype, pin_memory=pinned)
        with temporary(self.folder / "residuals") as name:
            # Blocks are taken now: a full disk is an error here, not a SIGBUS in the middle of a layer.
            with name.open("r+b") as file, contextlib.suppress(AttributeError):
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(str(name), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
