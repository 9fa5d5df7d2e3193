"""Residual streams on disk between two layers, so that a pass that was killed continues there."""

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.calibration.residuals import ResidualStore
from lightning_prune.support.files import temporary

WAIT = 10.0  # seconds of work that one must at least save
SHARE = 0.1  # of the time of a pass that may be spent on writing them
DISK_SHARE = 0.25  # of the free disk that one may take; the one before it is replaced only when it is whole
SPEED = 200e6  # bytes per second, until the first was written


class StreamCheckpoints:
    """The newest stream checkpoint of the open pass: what its residual stores held after one step, in a file in
    ``folder`` (None keeps nothing). Steps before it, which may take hours, are not taken again."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "streams.pt"
        self.step = -1  # after which it was written; −1: there is none
        self._since, self._speed = time.monotonic(), SPEED
        if self.path is not None and self.path.exists():
            try:
                self.step = self._read()["step"]
            except Exception:  # whatever torch makes of a damaged file: the pass begins anew
                self.clear()

    def load(self) -> dict[str, Tensor]:
        """The stores' values ``[rows, L, D]`` by name."""
        values: dict[str, Tensor] = self._read()["values"]
        return values

    def offer(self, step: int, stores: Mapping[str, ResidualStore]) -> None:
        """Write a stream checkpoint after ``step`` where it is worth its time and there is room for it."""
        size, worked = sum(store.nbytes for store in stores.values()), time.monotonic() - self._since
        if self.path is None or worked < WAIT or size / self._speed > SHARE * worked:
            return
        started = time.monotonic()
        with suppress(OSError):  # a full disk: the run continues without
            self.path.parent.mkdir(exist_ok=True)
            if size > DISK_SHARE * shutil.disk_usage(self.path.parent).free:
                return
            values = {name: store.values for name, store in stores.items() if store.nbytes}
            with temporary(self.path) as partial:
                torch.save({"step": step, "values": values}, partial)
                os.replace(partial, self.path)
            self.step = step
        self._since = time.monotonic()
        self._speed = max(size, 1) / max(self._since - started, 1e-3)

    def clear(self) -> None:
        """Remove the stream checkpoint at the end of a pass; the work of the next pass is counted from here."""
        self.step, self._since = -1, time.monotonic()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self) -> Any:
        assert self.path is not None
        return torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
