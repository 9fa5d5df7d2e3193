"""Perplexity of a dense or pruned model on the evaluation sets, layer by layer."""

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_prune.calibration.statistics.token_statistic import TokenStatistic
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import choose_onload
from lightning_prune.models.model_slot import ModelSlot, load_dtype
from lightning_prune.support.devices import widened
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
    """

    def __init__(self, pretrained: str = "demo", onload: str = "auto") -> None:
        super().__init__()
        self.pretrained = pretrained
        self.name = ""
        self.seconds = Seconds()
        self.slot = ModelSlot(onload, self.seconds)
        self.progress = Progress(shown=False)
        self.perplexity: dict[str, PerplexityResult] = {}
        self._perplexities = nn.ModuleList()

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.pretrained)

    @property
    def datamodule(self) -> CalibrationDataModule:
        """The trainer's evaluation sets."""
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    def check_model(self) -> None:
        """Refuse a model that cannot be opened before any text is read for it: UserError."""
        self.checkpoint.check()

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
            longest = max((item.tokens.shape[1] for item in data.evaluation), default=1)
            batch = int(data.eval_batch_size * longest * config.hidden_size * dtype.itemsize)
            data.eval_batches_per_step = max(1, STEP_BYTES // batch)

    def configure_optimizers(self) -> None:
        """No optimizer: nothing is trained."""

    def on_test_epoch_start(self) -> None:
        """Open the model; one perplexity per evaluation set."""
        with torch.inference_mode(False):
            self.slot.open(self.checkpoint, load_dtype(str(self.trainer.precision)), self.device)
            self._started = time.perf_counter()
            self._perplexities = nn.ModuleList(Perplexity() for _ in self.datamodule.evaluation).to(self.device)

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take windows ``[B, L]`` through all layers, ``eval_batch_size`` at a time in every layer."""
        tokens, weight, _ = batch
        metric, size = self._perplexities[dataloader_idx], self.datamodule.eval_batch_size
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
                metric.update(model.losses(hidden, tokens[rows]), weight[rows])  # type: ignore[operator]

    def on_test_epoch_end(self) -> None:
        """Leave the results in ``self.perplexity`` by name of the evaluation set."""
        self.perplexity = {
            data.name: PerplexityResult(float(metric.reduced()), data.manifest["predicted_tokens"])  # type: ignore[operator]
            for data, metric in zip(self.datamodule.evaluation, self._perplexities, strict=True)
        }
        self.progress.finish(evaluation_phase(self.name))
        self.seconds.add("evaluate", time.perf_counter() - self._started)


def measure_perplexity(
    trainer: L.Trainer,
    data: CalibrationDataModule,
    checkpoint: Checkpoint,
    name: str,
    slot: ModelSlot,
    progress: Progress,
) -> dict[str, PerplexityResult]:
    """Perplexity by evaluation set of the model ``checkpoint``, which ``slot`` holds open afterwards.

    What is open there already is measured as it is, with a plan that is applied in memory. The time is counted in the
    slot's seconds as ``evaluate <name>``.
    """
    evaluation = Evaluation(checkpoint.pretrained)
    evaluation.checkpoint = checkpoint
    evaluation.slot, evaluation.name, evaluation.progress = slot, name, progress
    trainer.test(evaluation, data, verbose=False)
    slot.seconds.add(f"evaluate {name}", evaluation.seconds.get("evaluate", 0.0))
    return evaluation.perplexity
