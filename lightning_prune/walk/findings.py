"""What finished layers left behind, in memory and on disk, so that a killed run goes on where it was."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lightning_prune.walk.passes import WEIGHT, Finding

PARTIAL = ".partial"


class Findings:
    """One ``Finding`` per step. With a folder, each is a safetensors file there as soon as its step has ended.

    New weights stay on disk alone where there is a folder: they are as large as the layer.

    Args:
        folder: None keeps everything in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._found: dict[int, Finding] = {}
        self._weights: dict[int, Finding] = {}
        if folder is not None and folder.is_dir():
            for step in _steps(folder):
                self._take(step, load_file(self._path(step)))

    def __contains__(self, step: int) -> bool:
        return step in self._found

    def __len__(self) -> int:
        return len(self._found)

    def add(self, step: int, finding: Finding, write: bool = True) -> None:
        """Keep what a step left; ``write`` on one process only."""
        finding = {name: tensor.detach().cpu().contiguous() for name, tensor in finding.items()}
        if self.folder is not None and write:
            self.folder.mkdir(exist_ok=True)
            partial = self._path(step).with_suffix(PARTIAL)
            save_file(finding, partial)
            os.replace(partial, self._path(step))
        self._take(step, finding)

    def of(self, step: int) -> Finding:
        """What a step left, without new weights."""
        return self._found[step]

    def weights(self, step: int) -> Finding:
        """New weights of a step by role, of the dense shape."""
        if step in self._weights:
            return self._weights[step]
        if self.folder is None or step not in self._found or not self._path(step).is_file():
            return {}
        return _weights_of(load_file(self._path(step)))

    def remove(self) -> None:
        """Delete the folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _take(self, step: int, finding: Finding) -> None:
        self._found[step] = {name: tensor for name, tensor in finding.items() if not name.startswith(WEIGHT)}
        if self.folder is None:
            self._weights[step] = _weights_of(finding)

    def _path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"step_{step:05d}.safetensors"


def _weights_of(finding: Finding) -> Finding:
    return {name.removeprefix(WEIGHT): tensor for name, tensor in finding.items() if name.startswith(WEIGHT)}


def _steps(folder: Path) -> Iterator[int]:
    """Steps of which a whole file is there; what a kill left half-written is deleted."""
    for path in sorted(folder.iterdir()):
        if path.suffix == PARTIAL:
            path.unlink(missing_ok=True)
        elif path.suffix == ".safetensors":
            try:
                load_file(path)
            except (OSError, SafetensorError):
                path.unlink(missing_ok=True)
                continue
            yield int(path.stem.removeprefix("step_"))
