"""One vector per token of every sample, between two layers: the residual stream, or a block's inner activations."""

import contextlib
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from lightning_prune.support.devices import CPU, can_pin, wait
from lightning_prune.support.files import temporary
from lightning_prune.support.memory import free_host_bytes

SHARE = 0.25  # of free host memory that one store may take; a larger one is a mapped file


class ResidualStore:
    """``[rows, L, D]`` in host memory, pinned for an accelerator, or in a mapped temporary file if that is too large.

    Memory is taken at the first ``put``. The file, in ``folder``, loses its name at once, so that nothing is left,
    however the process ends. ``device``: where values come from and go to; where ``pinned``, such copies do not wait.
    """

    def __init__(self, rows: int, folder: Path, device: torch.device = CPU) -> None:
        self.rows, self.folder, self.device, self.pinned = rows, folder, device, False
        self._values: Tensor | None = None

    @property
    def values(self) -> Tensor | None:
        """All values, for the host to read: every copy has arrived. None before the first ``put``."""
        if self.pinned:
            wait(self.device)
        return self._values

    @property
    def nbytes(self) -> int:
        """Size of ``values`` in bytes, without waiting for copies."""
        return 0 if self._values is None else self._values.nbytes

    def put(self, rows: slice, values: Tensor) -> None:
        """Keep ``values`` ``[n, L, D]`` of the samples ``rows``; dtype and shape are those of the first ones."""
        if self._values is None:
            self._values = self._new((self.rows, *values.shape[1:]), values.dtype)
        late = self.pinned and values.device.type != "cpu"
        store = self._values if late else self.values  # the host would write while older copies are under way
        assert store is not None
        store[rows].copy_(values.detach(), non_blocking=late)

    def get(self, rows: slice, device: torch.device) -> Tensor:
        """``[n, L, D]`` on ``device``; on the CPU a view that must not be written to."""
        store = self.values if device.type == "cpu" else self._values
        assert store is not None, "nothing was put here"
        return store[rows].to(device, non_blocking=self.pinned)

    def close(self) -> None:
        """Free the store's memory."""
        self._values, self.pinned = None, False

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size <= SHARE * free_host_bytes():
            self.pinned = can_pin(self.device)
            return torch.empty(shape, dtype=dtype, pin_memory=self.pinned)
        with temporary(self.folder / "residuals") as name:
            # Blocks are taken now: a full disk is an error here, not a SIGBUS in the middle of a layer.
            with name.open("r+b") as file, contextlib.suppress(AttributeError):
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(str(name), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
