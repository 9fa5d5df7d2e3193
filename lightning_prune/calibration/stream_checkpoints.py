"""Residual streams on disk between two layers, so that a pass that was killed continues there."""

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lightning_prune.calibration.residuals import ResidualStore
from lightning_prune.support.files import temporary

WAIT = 10.0  # seconds of work that one must at least save
SHARE = 0.1  # of the time of a pass that may be spent on writing them
DISK_SHARE = 0.25  # of the free disk that one may take; the one before it is removed only when it is whole
SPEED = 200e6  # bytes per second, until the first was written


class StreamCheckpoints:
    """The newest stream checkpoint of the open pass: what its residual stores held after one step.

    The later layers of a removal prior take hours on a large model, and beginning anew would take them again. Steps
    before it are not taken again; their results are known.

    Args:
        folder: where the file is; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.step = -1  # after which the newest one was written; −1: there is none
        self._since, self._speed = time.monotonic(), SPEED
        for path in self._files():  # ascending
            try:
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                self.step = int(path.stem.rpartition("_")[2])
            except Exception:  # whatever torch makes of a damaged file: the pass begins anew
                path.unlink(missing_ok=True)

    def load(self) -> dict[str, Tensor]:
        """The stores' values ``[rows, L, D]`` by name."""
        values: dict[str, Tensor] = torch.load(self._path(self.step), map_location="cpu", mmap=True, weights_only=True)
        return values

    def offer(self, step: int, stores: Mapping[str, ResidualStore]) -> None:
        """Write one after ``step`` where it is worth its time and there is room for it."""
        size, worked = sum(store.nbytes for store in stores.values()), time.monotonic() - self._since
        if self.folder is None or worked < WAIT or size / self._speed > SHARE * worked:
            return
        started = time.monotonic()
        with suppress(OSError):  # a full disk: the run continues without
            self.folder.mkdir(exist_ok=True)
            if size > DISK_SHARE * shutil.disk_usage(self.folder).free:
                return
            path = self._path(step)
            values = {name: store.values for name, store in stores.items() if store.nbytes}
            with temporary(path) as partial:
                torch.save(values, partial)
                os.replace(partial, path)
            self.step = step
            for old in self._files():
                if old != path:
                    old.unlink(missing_ok=True)
        self._since = time.monotonic()
        self._speed = max(size, 1) / max(self._since - started, 1e-3)

    def clear(self) -> None:
        """The pass is over; the next one's work is counted from here."""
        self.step, self._since = -1, time.monotonic()
        for path in self._files():
            path.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"streams_{step:05d}.pt"

    def _files(self) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob("streams_*.pt"))
