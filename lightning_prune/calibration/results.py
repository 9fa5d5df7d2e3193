"""The results of all steps, in memory and on disk, so that a killed run continues where it was."""

from pathlib import Path

from safetensors import SafetensorError

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.support.files import sweep, write_bytes


class Results:
    """One ``LayerResult`` per step, in memory or each in a file of ``folder`` as soon as its step has ended; then new
    weights, as large as the layer, are on disk alone. Of several processes one ``writes``, and all read."""

    def __init__(self, folder: Path | None = None, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self._results: dict[int, LayerResult] = {}
        if folder is None or not folder.is_dir():
            return
        if writes:
            sweep(folder)
        for path in sorted(folder.glob("step_*.safetensors")):
            try:
                self._results[int(path.stem.removeprefix("step_"))] = LayerResult.from_file(path).without_weights()
            except (OSError, SafetensorError, KeyError, ValueError):  # a kill left it half-written
                if writes:
                    path.unlink(missing_ok=True)

    def __contains__(self, step: int) -> bool:
        return step in self._results

    def add(self, step: int, result: LayerResult) -> None:
        """Keep the result of a step."""
        result = result.on_host()
        if self.folder is not None and self.writes:
            # Not safetensors' save_file, whose error on a full disk does not say so.
            write_bytes(self.folder / f"step_{step:05d}.safetensors", result.to_bytes())
        self._results[step] = result if self.folder is None else result.without_weights()

    def of(self, step: int) -> LayerResult:
        """The result of a step; its new weights may be missing (``whole``)."""
        return self._results[step]

    def whole(self, step: int) -> LayerResult:
        """The result of a step with its new weights; empty where it is not known."""
        path = self.folder and self.folder / f"step_{step:05d}.safetensors"
        if path and step in self and path.is_file():
            return LayerResult.from_file(path)
        return self._results.get(step, LayerResult())
