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

    The file loses its name at once, so that nothing stays behind, however the process ends. Memory is taken at the
    first ``put``.

    Args:
        rows: samples of this process.
        folder: where a temporary file goes.
    """

    def __init__(self, rows: int, folder: Path) -> None:
        self.rows, self.folder = rows, folder
        self.mapped = False
        self._values: Tensor | None = None

    def put(self, rows: slice, values: Tensor) -> None:
        """Keep ``values`` ``[n, L, D]`` of the samples ``rows``; dtype and shape are those of the first ones."""
        if self._values is None:
            self._values = self._new((self.rows, *values.shape[1:]), values.dtype, values.is_cuda)
        self._values[rows].copy_(values.detach(), non_blocking=True)

    def get(self, rows: slice, device: torch.device) -> Tensor:
        """``[n, L, D]`` on ``device``; on the CPU a view that must not be written to."""
        assert self._values is not None, "nothing was put here"
        return self._values[rows].to(device, non_blocking=True)

    @property
    def values(self) -> Tensor | None:
        """All of it, ``[rows, L, D]``; None before the first ``put``."""
        return self._values

    def close(self) -> None:
        """Give the memory back."""
        self._values = None

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size <= SHARE * free_host_bytes():
            return torch.empty(shape, dtype=dtype, pin_memory=pinned)
        self.mapped = True
        with temporary(self.folder / "residuals") as name:
            # Blocks are taken now: a full disk is an error here, not a SIGBUS in the middle of a layer.
            with name.open("r+b") as file, contextlib.suppress(AttributeError):
                os.posix_fallocate(file.fileno(), 0, size)
            values = torch.from_file(str(name), shared=True, size=math.prod(shape), dtype=dtype)
        return values.view(shape)
