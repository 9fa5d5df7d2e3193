"""Perplexity of a dense or pruned model on the evaluation sets, layer by layer, and its distance from another one."""

import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_prune.calibration.residuals import ResidualStore
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.evaluation.continuations import Continuations, continuations
from lightning_prune.evaluation.distance import Distance, TokenMeans, losses_and_distances
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import LayeredModel, choose_onload, open_head
from lightning_prune.models.model_slot import ModelSlot, load_dtype
from lightning_prune.models.weights import OPTION
from lightning_prune.support.errors import UserError
from lightning_prune.support.progress import Progress
from lightning_prune.support.timing import Seconds

STEP_BYTES = 256 * 2**20  # residual stream of the evaluation windows that cross the layers together


def unigram_perplexity(tokens: Tensor, vocab_size: int) -> float:
    """Perplexity of token frequencies alone on the predicted ``tokens`` int64 ``[N, L]``, all but the first of every
    window: what context is worth is measured from here.

    Every token's probability is its frequency among the others; frequencies of the text with the token itself would
    know a short text by heart. What is nowhere else shares the probability of the unseen, Good and Turing's estimate:
    the share of tokens that are there once.
    """
    _, counts = tokens[:, 1:].unique(return_counts=True)
    known, total = counts[counts > 1].double(), int(counts.sum())
    once = int((counts == 1).sum())
    loss = -(known * ((known - 1) / (total - 1) * (1 - once / total)).log()).sum()
    if once:
        loss = loss - once * math.log(once / total / (vocab_size - len(counts) + 1))
    return float((loss / total).exp())


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of one model on one evaluation set, and the number of predicted tokens."""

    perplexity: float
    tokens: int


@dataclass
class Measured:
    """Results of one model on the evaluation sets, by their names.

    ``distance`` and ``written`` are there where it was compared with another model, or that one with it. Of that one
    ``streams`` holds, until ``close``, every set's residual stream after the last layer, of this process's windows.
    """

    checkpoint: Checkpoint
    perplexity: dict[str, PerplexityResult] = field(default_factory=dict)
    distance: dict[str, Distance] = field(default_factory=dict)
    written: Continuations | None = None
    streams: list[ResidualStore] = field(default_factory=list)

    def close(self) -> None:
        """Give the memory of the residual streams back."""
        while self.streams:
            self.streams.pop().close()


def evaluation_phase(name: str) -> str:
    """Name of the progress phase in which the model ``name`` (dense, pruned) is evaluated."""
    return f"perplexity of the {name} model" if name else "perplexity"


def evaluation_work(data: CalibrationDataModule, num_layers: int) -> float:
    """Work of one evaluation, in tokens through a layer."""
    return float(num_layers * sum(item.tokens.numel() for item in data.evaluation))


class Evaluation(L.LightningModule):
    """Measures the perplexity of one causal LM in the trainer's precision.

    The model is not a submodule: Lightning would move it to the device whole.

    Args:
        pretrained: Model folder or hub id, dense or pruned. ``demo`` is the small model inside the package.
        onload: ``model`` keeps all weights on the device, ``layer`` brings in one decoder layer at a time and needs
            memory for two of them, ``auto`` takes what fits. The result is the same.
    """

    def __init__(self, pretrained: str = "demo", onload: str = "auto") -> None:
        super().__init__()
        self.pretrained = pretrained
        self.name = ""
        self.seconds = Seconds()
        self.slot = ModelSlot(onload, self.seconds)
        self.progress = Progress(shown=False)
        self.scratch: Path | None = None  # where to keep what others are compared with; None keeps nothing
        self.reference: Measured | None = None  # to compare with: of the same sets, by as many processes
        self._dense: LayeredModel | None = None  # the head of that model
        self._means: list[TokenMeans] = []  # of every set
        self._rows: list[int] = []  # of every set, the windows so far

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint to evaluate, opened once."""
        return Checkpoint.open(self.pretrained)

    @cached_property
    def measured(self) -> Measured:
        """The results, once ``test`` has run."""
        return Measured(self.checkpoint)

    @property
    def perplexity(self) -> dict[str, PerplexityResult]:
        """Perplexity by name of the evaluation set."""
        return self.measured.perplexity

    @property
    def datamodule(self) -> CalibrationDataModule:
        """The trainer's evaluation sets."""
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    def check_model(self) -> None:
        """Refuse a model that cannot be opened before any text is read for it: UserError."""
        self.checkpoint.check()

    def check_dense(self, pretrained: str) -> Checkpoint:
        """The model to compare with, opened.

        Raises:
            UserError: it cannot be opened, or has another vocabulary.
        """
        try:
            dense = Checkpoint.open(pretrained)
            dense.check()
        except UserError as error:
            raise UserError(str(error).replace(OPTION, "--dense")) from None
        ours, theirs = self.checkpoint.limits[0], dense.limits[0]
        if ours != theirs:
            raise UserError(
                f"--dense: '{pretrained}' has {theirs} tokens in its vocabulary, '{self.pretrained}' has {ours}. "
                "Distributions can be compared over one vocabulary only: give models of one tokenizer."
            )
        mine, other = self.checkpoint.tokenizer, dense.tokenizer
        if mine is not None and other is not None and mine.get_vocab() != other.get_vocab():
            raise UserError(
                f"--dense: the tokenizers of '{pretrained}' and '{self.pretrained}' name other tokens by the same ids. "
                "Give models of one tokenizer."
            )
        return dense

    def setup(self, stage: str) -> None:
        """Check everything that can be checked without weights.

        Raises:
            UserError: no model at ``pretrained``, unknown family, tokens that do not fit the model.
        """
        config: Any = self.checkpoint.config
        data, dtype = self.datamodule, load_dtype(str(self.trainer.precision))
        data.check_against_model(*self.checkpoint.limits)
        self.progress.expect(evaluation_phase(self.name), evaluation_work(data, config.num_hidden_layers))
        data.eval_batches_per_step = 1
        if choose_onload(self.slot.onload, self.checkpoint, dtype, self.trainer.strategy.root_device) == "layer":
            # All at once is fastest where every step brings in the layers anew; the residual stream is the limit.
            tokens = max((data.eval_batch(item) * item.tokens.shape[1] for item in data.evaluation), default=1)
            data.eval_batches_per_step = max(1, STEP_BYTES // int(tokens * config.hidden_size * dtype.itemsize))

    def configure_optimizers(self) -> None:
        """No optimizer: nothing is trained."""

    def on_test_epoch_start(self) -> None:
        """Open the model, and the head of the one to compare with; one perplexity and distance per evaluation set."""
        sets, dtype = self.datamodule.evaluation, load_dtype(str(self.trainer.precision))
        with torch.inference_mode(False):
            self.slot.open(self.checkpoint, dtype, self.device)
            self._started = time.perf_counter()
            values = 1 if self.reference is None else 4
            self._means = [TokenMeans(values).to(self.device) for _ in sets]
            self._rows = [0] * len(sets)
            if self.scratch is not None:
                rows = [-(-len(item.tokens) // self.trainer.world_size) for item in sets]
                self.measured.streams = [ResidualStore(count, self.scratch, self.device) for count in rows]
            if self.reference is not None:
                self._dense = open_head(self.reference.checkpoint, dtype, self.device)

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take windows ``[B, L]`` through all layers, ``eval_batch`` of them at a time in every layer."""
        tokens, weight, _ = batch
        size = self.datamodule.eval_batch(self.datamodule.evaluation[dataloader_idx])
        model, layers = self.slot.model, self.slot.model.num_layers
        # Not in inference mode, in which Lightning tests: calibration continues with tensors that are made here.
        with torch.inference_mode(False), torch.no_grad():
            parts: list[Tensor] = [model.embed(part) for part in tokens.split(size)]  # type: ignore[no-untyped-call]
            for layer in range(layers):
                with model.layer(layer):
                    model.announce(layer + 1)
                    for number, hidden in enumerate(parts):
                        parts[number] = model.run(layer, hidden)
                        work = hidden.shape[0] * hidden.shape[1]
                        self.progress.advance(evaluation_phase(self.name), work, f"layer {layer + 1} of {layers}")
            for number, hidden in enumerate(parts):
                rows = slice(number * size, number * size + len(hidden))
                self._count(dataloader_idx, hidden, tokens[rows], weight[rows])

    def _count(self, index: int, hidden: Tensor, tokens: Tensor, weight: Tensor) -> None:
        """Add windows ``[B, L]`` of one evaluation set, whose last residual stream is ``hidden``."""
        rows = slice(self._rows[index], self._rows[index] + len(hidden))
        self._rows[index] += len(hidden)
        if self.measured.streams:
            self.measured.streams[index].put(rows, hidden)
        if self.reference is None or self._dense is None:
            values = [self.slot.model.losses(hidden, tokens)]
        else:
            dense, size = self.reference.streams[index].get(rows, hidden.device), self.checkpoint.limits[0]
            values = losses_and_distances(self.slot.model.head, hidden, self._dense.head, dense, tokens, size)
        self._means[index].update(weight, *values)

    def on_test_epoch_end(self) -> None:
        """Store the results in ``self.measured``."""
        for data, means in zip(self.datamodule.evaluation, self._means, strict=True):
            tokens = data.manifest["predicted_tokens"]
            self.measured.perplexity[data.name] = PerplexityResult(means.perplexity(), tokens)
            if self.reference is not None:
                self.measured.distance[data.name] = means.distance()
        self._write()
        if self._dense is not None:
            self._dense.close()
            self._dense = None
        self.progress.finish(evaluation_phase(self.name))
        self.seconds.add("evaluate", time.perf_counter() - self._started)

    def _write(self) -> None:
        """Have the model continue the prompts if it is compared with another model, or another model with it."""
        prompts, other = self.datamodule.prompts, self.reference
        if prompts is None or not (self.scratch or other) or (other is not None and other.written is None):
            return
        with torch.inference_mode(False), self.trainer.precision_plugin.forward_context():
            self.measured.written = continuations(self.slot.model, self.checkpoint, prompts)


def measure(
    trainer: L.Trainer,
    data: CalibrationDataModule,
    checkpoint: Checkpoint,
    name: str,
    slot: ModelSlot,
    progress: Progress,
    scratch: Path | None = None,
    reference: Measured | None = None,
) -> Measured:
    """Evaluate the model ``checkpoint``, which ``slot`` holds open afterwards and times as ``evaluate <name>``; what is
    open there already is measured as it is, with a plan that is applied in memory. ``scratch`` and ``reference`` as in
    ``Evaluation``."""
    evaluation = Evaluation(checkpoint.pretrained)
    evaluation.checkpoint = checkpoint
    evaluation.slot, evaluation.name, evaluation.progress = slot, name, progress
    evaluation.scratch, evaluation.reference = scratch, reference
    trainer.test(evaluation, data, verbose=False)
    slot.seconds.add(f"evaluate {name}", evaluation.seconds.get("evaluate", 0.0))
    return evaluation.measured
