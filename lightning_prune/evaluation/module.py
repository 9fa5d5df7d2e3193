"""A LightningModule that holds one causal LM and measures its perplexity on the datamodule's evaluation sets."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.errors import UserError
from lightning_prune.evaluation.perplexity import Perplexity
from lightning_prune.surgery.anatomy import family_of
from lightning_prune.surgery.loading import load_config, load_model

DTYPES = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
    "64-true": torch.float64,
}


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of one model on one evaluation set, and the number of predicted tokens."""

    perplexity: float
    tokens: int


class EvaluatedModel(L.LightningModule):
    """Loads a causal LM in the trainer's precision and measures perplexity.

    Args:
        pretrained: Model folder or hub id, dense or pruned. ``demo`` is the small model inside the package.
    """

    net: PreTrainedModel | None

    def __init__(self, pretrained: str = "demo") -> None:
        super().__init__()
        self.pretrained = pretrained
        self.net = None
        self.seconds: dict[str, float] = {}
        self.perplexity: dict[str, PerplexityResult] = {}
        self._perplexities = nn.ModuleList()

    @property
    def model(self) -> PreTrainedModel:
        """The loaded causal LM."""
        assert self.net is not None, "configure_model loads the model; call it through a Trainer"
        return self.net

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

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to ``self.seconds[phase]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def setup(self, stage: str) -> None:
        """Everything that can be refused without weights is refused here.

        Raises:
            UserError: no model at ``pretrained``, unknown family, tokens that do not fit the model.
        """
        if self.net is None:
            config = load_config(self.pretrained)
            family_of(config)
            self.check_before_loading(config)
        else:
            config = self.net.config
        positions = getattr(config, "max_position_embeddings", None)
        self.datamodule.check_against_model(config.vocab_size, positions)

    def check_before_loading(self, config: Any) -> None:
        """Hook for further checks that need only the config."""

    def configure_model(self) -> None:
        """Load the weights, straight in the target dtype."""
        if self.net is None:
            with self.timed("load"):
                self.net = load_model(self.pretrained, self.load_dtype)
            self.net.requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EvaluatedModel":
        """Cast parameters only: rotary buffers and metric states stay in fp32 under ``*-true`` precisions."""

        def guarded(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if isinstance(tensor, nn.Parameter) or result.dtype == tensor.dtype:
                return result
            return tensor.to(result.device)

        return super()._apply(guarded, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, L, V]`` of packed sequences ``[B, L]``."""
        output: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return output

    def configure_optimizers(self) -> None:
        """No optimizer: pruning reads the weights, it does not train them."""

    def on_test_epoch_start(self) -> None:
        """One perplexity per evaluation set."""
        self._test_started = time.perf_counter()
        self._perplexities = nn.ModuleList(Perplexity() for _ in self.datamodule.evaluation).to(self.device)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one batch of windows ``[B, L]`` with sample weights ``[B]``."""
        tokens, weight = batch
        self._perplexities[dataloader_idx].update(self.logits(tokens), tokens, weight)  # type: ignore[operator]

    def on_test_epoch_end(self) -> None:
        """Leave the results in ``self.perplexity`` by name of the evaluation set."""
        self.perplexity = {
            data.name: PerplexityResult(float(metric.compute()), data.manifest["predicted_tokens"])  # type: ignore[operator]
            for data, metric in zip(self.datamodule.evaluation, self._perplexities, strict=True)
        }
        self.seconds["evaluate"] = self.seconds.get("evaluate", 0.0) + time.perf_counter() - self._test_started
