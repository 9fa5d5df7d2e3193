"""Reading the parameters of a model, a few names at a time."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_prune.models.weights import TensorEntry
from lightning_prune.support.devices import can_pin

ALIGNED = 64  # bytes, as in fresh memory: elsewhere, products with a single row and of all experts round otherwise


class Source(Protocol):
    """Gives parameters by the names they have in the model."""

    def read(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """The parameters ``names``, in ``dtype`` (None: as stored), on ``device``."""
        ...


class CheckpointSource:
    """The safetensors files of one checkpoint, kept open.

    On the CPU and in the stored dtype a tensor is a private view of the file, which takes no memory of its own; of
    experts in one tensor, and of a single row, it is a copy where the file has it at an odd place.
    """

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        self.entries = entries
        self._open: dict[Path, Any] = {}

    def read(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """Read parameters, see ``Source``. One tensor at a time is in memory twice while it is cast."""
        tensors: dict[str, Tensor] = {}
        for name in names:
            entry = self.entries[name]
            parts = [self._tensor(*place) for place in entry.places]
            if len(parts) > 1:
                tensors[name] = torch.cat([part.to(dtype=dtype) for part in parts]).view(entry.shape).to(device=device)
                continue
            tensor = parts[0].view(entry.shape).to(device=device, dtype=dtype)
            sensitive = len(entry.shape) == 3 or entry.shape[0] == 1
            tensors[name] = tensor.clone() if sensitive and tensor.data_ptr() % ALIGNED else tensor
        return tensors

    def _tensor(self, path: Path, stored: str) -> Tensor:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        tensor: Tensor = self._open[path].get_tensor(stored)
        return tensor

    def close(self) -> None:
        """Close the files; views of them stay valid."""
        self._open.clear()


class Prefetching:
    """Reads ahead: a thread reads the parameters that were announced, and ``read`` of these names waits for it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: tuple[tuple[str, ...], Future[dict[str, Tensor]]] | None = None

    def announce(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> None:
        """Begin to read ``names``, to the CPU only; in pinned memory where they are then copied to an accelerator."""
        key = tuple(names)
        if self._next is None or self._next[0] != key:
            self._next = (key, self._thread.submit(self._fetch, key, dtype, can_pin(device)))

    def read(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """Read parameters, see ``Source``; waits for the thread where they were announced."""
        if self._next is None or self._next[0] != tuple(names):
            return self.source.read(names, dtype, device)
        tensors = self._next[1].result()
        self._next = None
        return {name: tensor.to(device, non_blocking=tensor.is_pinned()) for name, tensor in tensors.items()}

    def close(self) -> None:
        """Wait for the thread and forget what it read."""
        self._next = None
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, names: Sequence[str], dtype: torch.dtype | None, pinned: bool) -> dict[str, Tensor]:
        tensors = self.source.read(names, dtype, torch.device("cpu"))
        if pinned:
            return {name: tensor.pin_memory() for name, tensor in tensors.items()}
        for tensor in tensors.values():
            # A view of the file is read from disk when it is touched; touch every page here, not in the layer.
            tensor.view(torch.uint8).flatten()[::4096].sum(dtype=torch.int64)
        return tensors
