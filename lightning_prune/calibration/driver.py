"""Drives calibration inside a Trainer's fit: stage after stage, a layer per epoch, a batch per training step."""

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lightning as L
from torch import Tensor

from lightning_prune.calibration.loop import CalibrationLoop
from lightning_prune.calibration.passes import Batch, Pass, Setting
from lightning_prune.calibration.results import Results
from lightning_prune.calibration.stream_checkpoints import StreamCheckpoints
from lightning_prune.models.layered import LayeredModel
from lightning_prune.support.names import LAYER_RESULTS
from lightning_prune.support.progress import Progress
from lightning_prune.support.timing import Seconds

CALIBRATING, REFITTING = "calibrating", "refitting"
PHASE_SECONDS = {CALIBRATING: "calibrate", REFITTING: "refit"}  # their names in metrics.json

Stage = tuple[str, list[Pass], float]  # its phase, and the share of the phase's work that is done after it


class CalibrationDriver:
    """Takes a method's stages one after the other; ``loop`` is that of the stage under way, or of the last one.

    ``tokens``: the calibration set ``[N, L]``, the same on every process; empty for methods without data. ``folder``:
    the run folder, where results are kept on the way; None keeps them in memory.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        model: LayeredModel,
        tokens: Tensor,
        batch_size: int,
        folder: Path | None,
        progress: Progress,
        seconds: Seconds,
    ) -> None:
        self.trainer, self.folder, self.progress, self.seconds = trainer, folder, progress, seconds
        self.setting = Setting(
            model=model,
            rows=-(-len(tokens) // trainer.world_size),  # as many as the loader gives every process
            samples=len(range(trainer.global_rank, len(tokens), trainer.world_size)),
            batch_size=batch_size,
            seq_len=tokens.shape[1],
            scratch=folder or Path(tempfile.gettempdir()),
            context=trainer.precision_plugin.forward_context,
            finished=lambda share: self.loop.advance_finish(share),
        )
        self.loop = CalibrationLoop([], self.setting, Results())

    def begin(self, stages: Iterator[Stage]) -> None:
        """Start the first stage; steps that need no batch are taken at once."""
        self.trainer.fit_loop.max_epochs = 0  # every stage adds its own when it begins; nothing else counts them
        self._stages = enumerate(stages)
        self._next_stage()

    def batch(self, batch: tuple[Tensor, Tensor, Tensor], number: int) -> None:
        """Tokens ``[B, L]``, sample weights ``[B]`` and indices ``[B]`` of batch ``number`` of the epoch."""
        tokens, weight, index = batch
        start = number * self.setting.batch_size
        self.loop.batch(Batch(tokens, weight, index, slice(start, start + len(tokens))))

    def end_epoch(self) -> None:
        """Finish the layer after the last batch, while the strategy is up: sums are reduced over processes."""
        with self.seconds.measure("finish layers"):
            self.loop.finish()
        self._take_steps_without_batches()

    def work(self, passes: list[Pass]) -> float:
        """The cost of all passes, in tokens through a layer."""
        loop = CalibrationLoop(passes, self.setting, Results())
        tokens = self.setting.rows * self.setting.seq_len
        return sum(sum(loop.work(number, tokens)) for number in range(len(loop.steps)))

    def _next_stage(self) -> None:
        if (following := next(self._stages, None)) is None:
            return
        number, (self._phase, passes, self._share) = following
        self._started, self._finishing = time.perf_counter(), self.seconds.get("finish layers", 0.0)
        folder = None
        if self.folder is not None:
            folder = self.folder / LAYER_RESULTS / (f"stage_{number}" if number else "")
        results = Results(folder, self.trainer.is_global_zero)
        # Several processes would have to stop at the same layer: they run a pass from its beginning.
        streams = StreamCheckpoints(folder if self.trainer.world_size == 1 else None)
        advance = partial(self.progress.advance, self._phase)
        self.loop = CalibrationLoop(passes, self.setting, results, streams, advance)
        self.trainer.strategy.barrier()  # all have read what is known before one writes more
        self.trainer.fit_loop.max_epochs += self.loop.epochs  # type: ignore[operator]
        self._take_steps_without_batches()

    def _take_steps_without_batches(self) -> None:
        while self.loop.remaining and not self.loop.reads:
            with self.seconds.measure("finish layers"):
                self.loop.start()
                self.loop.finish()
        if self.loop.remaining:
            return
        self.progress.finish(self._phase, self._share)
        if any(current.reads for current in self.loop.passes):
            finishing = self.seconds.get("finish layers", 0.0) - self._finishing
            self.seconds.add(PHASE_SECONDS[self._phase], time.perf_counter() - self._started - finishing)
        self._next_stage()
