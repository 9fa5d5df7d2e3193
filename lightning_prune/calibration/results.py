"""What finished layers left behind, in memory and on disk, so that a killed run goes on where it was."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lightning_prune.calibration.passes import WEIGHT, Finding
from lightning_prune.support.files import sweep, write_bytes


class Findings:
    """One ``Finding`` per step. With a folder, each is a safetensors file there as soon as its step has ended.

    New weights stay on disk alone where there is a folder: they are as large as the layer.

    Args:
        folder: None keeps everything in memory.
        writes: whether this process may change the folder; of several one does, and all read.
    """

    def __init__(self, folder: Path | None = None, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self._found: dict[int, Finding] = {}
        self._weights: dict[int, Finding] = {}
        if folder is not None and folder.is_dir():
            for step, finding in _found_in(folder, writes):
                self._take(step, finding)

    def __contains__(self, step: int) -> bool:
        return step in self._found

    def __len__(self) -> int:
        return len(self._found)

    def add(self, step: int, finding: Finding) -> None:
        """Keep what a step left."""
        finding = {name: tensor.detach().cpu().contiguous() for name, tensor in finding.items()}
        if self.folder is not None and self.writes:
            # Not save_file, which says in a way of its own that the disk is full.
            write_bytes(self._path(step), save(finding))
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


def _found_in(folder: Path, writes: bool) -> Iterator[tuple[int, Finding]]:
    """Every step of which a whole file is there; what a kill left half-written is deleted."""
    if writes:
        sweep(folder)
    for path in sorted(folder.glob("step_*.safetensors")):
        try:
            yield int(path.stem.removeprefix("step_")), load_file(path)
        except (OSError, SafetensorError):
            if writes:
                path.unlink(missing_ok=True)
