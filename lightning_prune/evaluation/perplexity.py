"""Perplexity of a dense or pruned model on the evaluation sets, layer by layer, and its distance from another one."""

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_prune.calibration.residuals import ResidualStore
from lightning_prune.calibration.statistics.token_statistic import TokenStatistic
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.evaluation.continuations import Continuations, continuations, is_affordable
from lightning_prune.evaluation.distance import Distance, Distances, losses_and_distances
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import LayeredModel, choose_onload, open_head
from lightning_prune.models.model_slot import ModelSlot, load_dtype
from lightning_prune.models.weights import OPTION
from lightning_prune.support.devices import widened
from lightning_prune.support.errors import UserError
from lightning_prune.support.progress import Progress
from lightning_prune.support.timing import Seconds

STEP_BYTES = 256 * 2**20  # residual stream of the evaluation windows that cross the layers together


class Perplexity(TokenStatistic):
    """exp(mean token loss) over packed windows: every token of a window but its first is predicted once."""

    loss_sum: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("loss_sum")

    def update(self, losses: Tensor, weight: Tensor) -> None:
        """Add a batch: token losses ``[B, L − 1]``; samples whose weight ``[B]`` is 0 are dropped."""
        counted = losses[weight > 0]
        self.loss_sum += widened(counted).sum()
        self.tokens += counted.numel()

    def compute(self) -> Tensor:
        """Perplexity, fp64 scalar; NaN when nothing was seen."""
        return torch.exp(self.loss_sum / self.tokens)


def unigram_perplexity(tokens: Tensor) -> float:
    """The floor under every language model: exp(H), H the entropy in nats of the predicted tokens' own frequencies.

    Args:
        tokens: int64 ``[N, L]``; the first token of every window is not predicted and does not count.
    """
    _, counts = tokens[:, 1:].unique(return_counts=True)
    share = counts.double() / counts.sum()
    return float(torch.exp(-(share * share.log()).sum()))


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of one model on one evaluation set, and the number of predicted tokens."""

    perplexity: float
    tokens: int


@dataclass
class Measured:
    """What one model showed on the evaluation sets, by their names.

    ``distance`` and ``written`` are there where it was compared with another model, or that one with it. Of that one
    ``streams`` holds the residual streams after the last layer, of this process's windows and one set after the other,
    until ``close``.
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
    """What progress calls the evaluation of the model that is called ``name`` (dense, pruned)."""
    return f"perplexity of the {name} model" if name else "perplexity"


def evaluation_work(data: CalibrationDataModule, num_layers: int) -> float:
    """Work of one evaluation, in tokens through a layer."""
    return float(num_layers * sum(item.tokens.numel() for item in data.evaluation))


class Evaluation(L.LightningModule):
    """Measures the perplexity of one causal LM in the trainer's precision.

    The model is no submodule: Lightning would move it to the device whole.

    Args:
        pretrained: Model folder or hub id, dense or pruned. ``demo`` is the small model inside the package.
        onload: ``model`` keeps all weights on the device, ``layer`` brings in one decoder layer at a time and needs
            memory for two of them, ``auto`` takes what fits. The result is the same.

    Attributes:
        scratch: where to keep what others are compared with, in files if memory does not do; None keeps nothing.
        reference: the model to compare with, evaluated on the same sets by as many processes.
    """

    def __init__(self, pretrained: str = "demo", onload: str = "auto") -> None:
        super().__init__()
        self.pretrained = pretrained
        self.name = ""
        self.seconds = Seconds()
        self.slot = ModelSlot(onload, self.seconds)
        self.progress = Progress(shown=False)
        self.scratch: Path | None = None
        self.reference: Measured | None = None
        self._perplexities, self._distances = nn.ModuleList(), nn.ModuleList()
        self._rows: list[int] = []  # of every set, the windows so far

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model, opened once."""
        return Checkpoint.open(self.pretrained)

    @cached_property
    def measured(self) -> Measured:
        """The results, once ``test`` has run."""
        return Measured(self.checkpoint)

    @property
    def perplexity(self) -> dict[str, PerplexityResult]:
        """By name of the evaluation set."""
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
        ours, theirs = self.checkpoint, dense
        if ours.limits[0] != theirs.limits[0]:
            raise UserError(
                f"--dense: '{pretrained}' has {theirs.limits[0]} tokens in its vocabulary, '{self.pretrained}' has "
                f"{ours.limits[0]}. Distributions can be compared over one vocabulary only: give models of one "
                "tokenizer."
            )
        mine, other = ours.tokenizer, theirs.tokenizer
        if mine is not None and other is not None and mine.get_vocab() != other.get_vocab():
            raise UserError(
                f"--dense: the tokenizers of '{pretrained}' and '{self.pretrained}' name other tokens by the same ids. "
                "Give models of one tokenizer."
            )
        return dense

    def setup(self, stage: str) -> None:
        """Everything that can be refused without weights is refused here.

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
            self._perplexities = nn.ModuleList(Perplexity() for _ in sets).to(self.device)
            self._rows = [0] * len(sets)
            if self.scratch is not None:
                rows = [-(-len(item.tokens) // self.trainer.world_size) for item in sets]
                self.measured.streams = [ResidualStore(count, self.scratch, self.device) for count in rows]
            if self.reference is not None:
                self._distances = nn.ModuleList(Distances() for _ in sets).to(self.device)
                self._dense: LayeredModel | None = open_head(self.reference.checkpoint, dtype, self.device)

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
        rows, model, perplexity = (
            slice(self._rows[index], self._rows[index] + len(hidden)),
            self.slot.model,
            self._perplexities[index],
        )
        self._rows[index] += len(hidden)
        if self.measured.streams:
            self.measured.streams[index].put(rows, hidden)
        if self.reference is None:
            perplexity.update(model.losses(hidden, tokens), weight)  # type: ignore[operator]
            return
        assert self._dense is not None
        dense, size = self.reference.streams[index].get(rows, hidden.device), self.checkpoint.limits[0]
        losses, distances = losses_and_distances(model.head, hidden, self._dense.head, dense, tokens, size)
        perplexity.update(losses, weight)  # type: ignore[operator]
        self._distances[index].update(distances, weight)  # type: ignore[operator]

    def on_test_epoch_end(self) -> None:
        """Leave the results in ``self.measured``."""
        for data, metric in zip(self.datamodule.evaluation, self._perplexities, strict=True):
            value = float(metric.reduced())  # type: ignore[operator]
            self.measured.perplexity[data.name] = PerplexityResult(value, data.manifest["predicted_tokens"])
        for data, metric in zip(self.datamodule.evaluation, self._distances):  # noqa: B905  # none without a reference
            self.measured.distance[data.name] = metric.distance()  # type: ignore[operator]
        self._write()
        if self.reference is not None and self._dense is not None:
            self._dense.close()
            self._dense = None
        self.progress.finish(evaluation_phase(self.name))
        self.seconds.add("evaluate", time.perf_counter() - self._started)

    def _write(self) -> None:
        """Have the model continue the prompts, where it is compared or compared with."""
        prompts, other = self.datamodule.prompts, self.reference
        if prompts is None or not (self.scratch or other) or (other is not None and other.written is None):
            return
        if not is_affordable(self.slot.model):
            rank_zero_warn(
                f"no continuations: the weights of '{self.checkpoint.pretrained}' are brought in layer by layer, and "
                "reading all of them for every token would take long. --data.continuations 0 says that none are wanted"
            )
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
    """Evaluate the model ``checkpoint``, which ``slot`` holds open afterwards.

    What is open there already is measured as it is, with a plan that is applied in memory. The time is counted in the
    slot's seconds as ``evaluate <name>``; ``scratch`` and ``reference`` as in ``Evaluation``.
    """
    evaluation = Evaluation(checkpoint.pretrained)
    evaluation.checkpoint = checkpoint
    evaluation.slot, evaluation.name, evaluation.progress = slot, name, progress
    evaluation.scratch, evaluation.reference = scratch, reference
    trainer.test(evaluation, data, verbose=False)
    slot.seconds.add(f"evaluate {name}", evaluation.seconds.get("evaluate", 0.0))
    return evaluation.measured
