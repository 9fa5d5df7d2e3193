"""The LightningModule that owns a layered model and measures its perplexity, layer by layer."""

import time
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_prune.calibration.statistics.perplexity import Perplexity
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import LayeredModel, Onload, choose_onload, open_layered
from lightning_prune.support.errors import UserError
from lightning_prune.support.progress import Progress
from lightning_prune.support.timing import Timed

DTYPES = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
    "64-true": torch.float64,
}
STEP_BYTES = 256 * 2**20  # residual stream of the evaluation windows that cross the layers together


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of one model on one evaluation set, and the number of predicted tokens."""

    perplexity: float
    tokens: int


class LayeredModule(Timed, L.LightningModule):
    """Opens a causal LM in the trainer's precision and measures perplexity.

    The model is no submodule: Lightning would move it to the device whole.

    Args:
        pretrained: Model folder or hub id, dense or pruned. ``demo`` is the small model inside the package.
        onload: ``model`` keeps all weights on the device, ``layer`` brings in one decoder layer at a time and needs
            memory for two of them, ``auto`` takes what fits. The result is the same.
    """

    def __init__(self, pretrained: str = "demo", onload: Onload | str = "auto") -> None:
        super().__init__()
        if onload not in ("auto", "model", "layer"):
            raise UserError(f"--model.onload: found '{onload}'; allowed: auto, model, layer.")
        self.pretrained = pretrained
        self.onload = onload
        self.evaluated = pretrained  # the model that ``test`` measures
        self.known_as = ""  # what that model is called while it is measured: dense, pruned, recovered
        self.seconds: dict[str, float] = {}
        self.perplexity: dict[str, PerplexityResult] = {}
        self.placement: Onload | None = None
        self._model: LayeredModel | None = None
        self._checkpoints: dict[str, Checkpoint] = {}
        self._opened: str | None = None
        self.progress = Progress(shown=False)
        self._perplexities = nn.ModuleList()

    @property
    def checkpoint(self) -> Checkpoint:
        """What is at ``pretrained``, opened once."""
        return self.checkpoint_of(self.pretrained)

    def checkpoint_of(self, pretrained: str) -> Checkpoint:
        """What is at ``pretrained``: the dense model, or the one that ``test`` measures. Weights need not be there yet.

        Raises:
            UserError: see ``Checkpoint.open``.
        """
        if pretrained not in self._checkpoints:
            self._checkpoints[pretrained] = Checkpoint.open(pretrained, weights=False)
        return self._checkpoints[pretrained]

    @property
    def model(self) -> LayeredModel:
        """The open model."""
        assert self._model is not None, "the model is opened when fit or test start; call them through a Trainer"
        return self._model

    @property
    def datamodule(self) -> CalibrationDataModule:
        """The trainer's calibration and evaluation sets."""
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    @property
    def load_dtype(self) -> torch.dtype:
        """The dtype the weights are read into; mixed precisions keep fp32 weights."""
        precision = str(self.trainer.precision)
        if precision not in DTYPES:
            raise UserError(f"--trainer.precision: '{precision}' is not supported. Choose one of {', '.join(DTYPES)}.")
        return DTYPES[precision]

    @property
    def evaluation_phase(self) -> str:
        """What progress calls ``test`` does."""
        return f"perplexity of the {self.known_as} model" if self.known_as else "perplexity"

    def evaluation_work(self, num_layers: int) -> float:
        """Work of one evaluation, in tokens through a layer."""
        return float(num_layers * sum(item.tokens.numel() for item in self.datamodule.evaluation))

    def open_model(self, pretrained: str) -> LayeredModel:
        """Open ``pretrained``, unless it is open; another one is closed first."""
        if self._opened != pretrained:
            self.close_model()
            with self.timed("load"):
                checkpoint = self.checkpoint_of(pretrained)
                placement = choose_onload(self.onload, checkpoint, self.load_dtype, self.device)
                if self.placement is None:
                    self.placement = placement
                self._model = open_layered(checkpoint, self.load_dtype, self.device, placement)
                if placement == "model":
                    self._model.load_all()
            self._opened = pretrained
        return self.model

    def close_model(self) -> None:
        """Drop the open model."""
        if self._model is not None:
            self._model.close()
        self._model = self._opened = None

    # The life cycle, in the order Lightning calls it

    def setup(self, stage: str) -> None:
        """Everything that can be refused without weights is refused here.

        Raises:
            UserError: no model at ``pretrained``, unknown family, tokens that do not fit the model.
        """
        checkpoint = self.checkpoint_of(self.evaluated if stage == "test" else self.pretrained)
        _ = checkpoint.tensors  # nothing of a size is built that the config alone claims
        config: Any = checkpoint.config
        if stage == "fit":
            self.check_before_loading(config)
        self.datamodule.check_against_model(config.vocab_size, getattr(config, "max_position_embeddings", None))
        if stage == "test":
            self.progress.expect(self.evaluation_phase, self.evaluation_work(config.num_hidden_layers))
            self.datamodule.eval_batches_per_step = self._batches_per_step(config)

    def check_model(self) -> None:
        """Refuse a model that cannot be opened before any text is read for it.

        Raises:
            UserError: as ``Checkpoint.open`` and ``Checkpoint.check``.
        """
        self.checkpoint.check()

    def check_before_loading(self, config: Any) -> None:
        """Hook for further checks that need only the config."""

    def configure_optimizers(self) -> None:
        """No optimizer: pruning reads the weights, it does not train them."""

    def on_test_start(self) -> None:
        """Open the model to measure."""
        with torch.inference_mode(False):
            self.open_model(self.evaluated)

    def on_test_epoch_start(self) -> None:
        """One perplexity per evaluation set."""
        self._test_started = time.perf_counter()
        with torch.inference_mode(False):
            self._perplexities = nn.ModuleList(Perplexity() for _ in self.datamodule.evaluation).to(self.device)

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take windows ``[B, L]`` through all layers, ``eval_batch_size`` at a time in every layer."""
        # Not in inference mode, in which Lightning tests: calibration goes on with tensors that were made here.
        with torch.inference_mode(False), torch.no_grad():
            self._measure(batch, self._perplexities[dataloader_idx])  # type: ignore[arg-type]

    def _measure(self, batch: tuple[Tensor, Tensor, Tensor], metric: Perplexity) -> None:
        tokens, weight, _ = batch
        size = self.datamodule.eval_batch_size
        parts: list[Tensor] = [self.model.embed(part) for part in tokens.split(size)]  # type: ignore[no-untyped-call]
        for layer in range(self.model.num_layers):
            with self.model.layer(layer):
                self.model.announce(layer + 1)
                at = f"layer {layer + 1} of {self.model.num_layers}"
                for number, hidden in enumerate(parts):
                    parts[number] = self.model.run(layer, hidden)
                    self.progress.advance(self.evaluation_phase, hidden.shape[0] * hidden.shape[1], at)
        for number, hidden in enumerate(parts):
            rows = slice(number * size, number * size + len(hidden))
            metric.update(self.model.losses(hidden, tokens[rows]), weight[rows])

    def on_test_epoch_end(self) -> None:
        """Leave the results in ``self.perplexity`` by name of the evaluation set."""
        self.perplexity = {
            data.name: PerplexityResult(float(metric.compute()), data.manifest["predicted_tokens"])  # type: ignore[operator]
            for data, metric in zip(self.datamodule.evaluation, self._perplexities, strict=True)
        }
        self.progress.finish(self.evaluation_phase)
        self.seconds["evaluate"] = self.seconds.get("evaluate", 0.0) + time.perf_counter() - self._test_started

    def _batches_per_step(self, config: Any) -> int:
        """All at once is fastest where layers are brought in anew for every step; the residual stream is the limit."""
        device = self.trainer.strategy.root_device
        if choose_onload(self.onload, self.checkpoint_of(self.evaluated), self.load_dtype, device) == "model":
            return 1
        data = self.datamodule
        longest = max((item.tokens.shape[1] for item in data.evaluation), default=1)
        each = data.eval_batch_size * longest * config.hidden_size * self.load_dtype.itemsize
        return max(1, STEP_BYTES // int(each))
