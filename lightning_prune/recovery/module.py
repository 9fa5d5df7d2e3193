"""The LightningModule that trains a pruned model to give back what pruning took."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.calibration.module import DTYPES
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.weights import OPTION
from lightning_prune.recovery import lora
from lightning_prune.recovery.distillation import hidden_distillation, logit_distillation, matching_states
from lightning_prune.recovery.schedule import cosine_with_warmup, progress_of
from lightning_prune.recovery.zeros import check_zeros, hold_zeros, kept_weights
from lightning_prune.support.errors import UserError
from lightning_prune.support.progress import Progress
from lightning_prune.support.timing import Timed

HELD_OUT = "held_out/loss"
BEST, LAST = "best", "last"
TRAINING = "training"
SCALE = 1000.0  # the bar's units for the whole of training


class Recovery(Timed, L.LightningModule):
    """Trains low-rank adapters or all weights of a pruned model, on text and by what the dense model predicts.

    Args:
        pretrained: The ``pruned`` folder of a finished run, such as logs/wanda/version_0/pruned.
        train: ``lora`` trains low-rank adapters on every linear of the layers and merges them at the end, ``all``
            trains all weights.
        distillation: Share of the loss that is the divergence from the dense model's predictions, 0 … 1; the rest is
            the cross-entropy of the text. With 0 no teacher is loaded.
        hidden_states: Weight of the relative distance from the dense model's hidden states, added to that loss.
        temperature: Softens both distributions of the divergence.
        teacher: The dense model to learn from. Default: the one that was pruned.
        learning_rate: Peak; reached after the warm-up, 0 at the end of the run (by steps or by time, whichever ends
            it).
        warmup: Share of the run in which the learning rate rises.
        weight_decay: Of AdamW.
        lora_rank: Rank of the adapters.
        lora_alpha: Adapters are scaled by alpha / rank. Default: twice the rank.
        patience: Measurements of the held-out loss without a better one after which training ends.
        label: Name of this system in run folders, TensorBoard and tables. Default: the pruning run's with _lora or
            _full.
    """

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The pruned model."""
        return Checkpoint.open(self.pretrained)

    def __init__(
        self,
        pretrained: str = "",
        train: Literal["lora", "all"] = "lora",
        distillation: float = 0.5,
        hidden_states: float = 0.0,
        temperature: float = 1.0,
        teacher: str | None = None,
        learning_rate: float = 1e-3,
        warmup: float = 0.05,
        weight_decay: float = 0.0,
        lora_rank: int = 16,
        lora_alpha: float | None = None,
        patience: int = 3,
        label: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, fine, allowed in (
            ("distillation", distillation, 0 <= distillation <= 1, "a share from 0 to 1"),
            ("hidden_states", hidden_states, 0 <= hidden_states < float("inf"), "a weight of 0 or more"),
            ("temperature", temperature, 0 < temperature < float("inf"), "a number above 0"),
            ("learning_rate", learning_rate, 0 < learning_rate < float("inf"), "a number above 0"),
            ("warmup", warmup, 0 <= warmup < 1, "a share of the run from 0 to below 1"),
            ("weight_decay", weight_decay, 0 <= weight_decay < float("inf"), "a number of 0 or more"),
            ("lora_rank", lora_rank, lora_rank >= 1, "a whole number of 1 or more"),
            ("lora_alpha", lora_alpha, lora_alpha is None or 0 < lora_alpha < float("inf"), "a number above 0"),
            ("patience", patience, patience >= 1, "a whole number of 1 or more"),
        ):
            if not fine:
                raise UserError(f"--model.{name}: found {value}; it must be {allowed}.")
        if train not in ("lora", "all"):
            raise UserError(f"--model.train: found '{train}'; allowed: lora, all.")
        self.pretrained, self.train_what, self.teacher = pretrained, train, teacher
        self.distillation, self.hidden_weight, self.temperature = distillation, hidden_states, temperature
        self.learning_rate, self.warmup, self.weight_decay = learning_rate, warmup, weight_decay
        self.lora_rank, self.lora_alpha = lora_rank, 2.0 * lora_rank if lora_alpha is None else lora_alpha
        self.patience, self.given_label = patience, label
        self.label = label or ""  # the command fills it in from the pruning run
        self.strict_loading = False  # what is not trained is in the checkpoint folder already
        self.progress = Progress(shown=False)
        self.seconds: dict[str, float] = {}
        self.folder: Path | None = None
        self.tokens_seen = 0
        self.seconds_before = 0.0  # of training, in the process that was interrupted
        self._started = time.perf_counter()
        self._shown = 0.0  # of the bar
        self._net: Any = None
        self._kept: dict[str, Tensor] | None = None
        self._teacher: list[nn.Module] = []  # no submodule: it is neither trained nor saved
        self._layers: list[int] = []

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss asks for the dense model."""
        return self.distillation > 0 or self.hidden_weight > 0

    @property
    def training_folder(self) -> Path:
        """Where the best and the last state are kept while training is under way."""
        assert self.folder is not None
        return self.folder / TRAINING

    def open(self, precision: str, base_model: str, layers: list[int], masked: bool) -> None:
        """Load the pruned model and, where the loss needs it, the dense one.

        Args:
            precision: of the trainer.
            base_model: the dense model, unless ``teacher`` names another.
            layers: number in the dense model of every layer that is left.
            masked: whether single weights were zeroed, which then stay zero.

        Raises:
            UserError: a model that cannot be loaded, vocabularies that differ, or a precision that cannot be trained.
        """
        if precision not in DTYPES or precision == "64-true":
            allowed = ", ".join(name for name in DTYPES if name != "64-true")
            raise UserError(f"--trainer.precision: found {precision}; allowed: {allowed}.")
        if precision in ("bf16-true", "16-true") and self.train_what == "all":
            raise UserError(
                f"--trainer.precision {precision} rounds most steps of an optimizer away when all weights are trained "
                "in it. Choose bf16-mixed or 32-true, or --model.train lora, whose adapters stay in fp32."
            )
        dtype = DTYPES[precision]
        with self.timed("load"):
            net: Any = self.checkpoint.load(dtype)
            self._kept = kept_weights(net) if masked else None
            if self.train_what == "lora":
                self._net = lora.attach(net, self.lora_rank, self.lora_alpha, self._kept)
            else:
                self._net = net.requires_grad_(True)
                if self._kept is not None:
                    hold_zeros(net, self._kept)
            if self.needs_teacher:
                self._teacher = [self._load_teacher(self.teacher or base_model, dtype, net.config.vocab_size)]
        self._layers = layers

    def _load_teacher(self, name: str, dtype: torch.dtype, vocab_size: int) -> nn.Module:
        try:
            teacher: nn.Module = Checkpoint.open(name).load(dtype)
        except UserError as error:
            raise UserError(
                str(error).replace(OPTION, "--model.teacher") + " Or train without it: --model.distillation 0."
            ) from None
        config: Any = teacher.config
        if config.vocab_size != vocab_size:
            raise UserError(
                f"--model.teacher: '{name}' has {config.vocab_size} tokens in its vocabulary, the pruned model "
                f"{vocab_size}. Give the dense model that was pruned."
            )
        teacher.requires_grad_(False)
        return teacher

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Cast frozen parameters only: in half precisions rotary tables and what is trained stay fp32."""

        def guarded(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            if moved.dtype == tensor.dtype or (isinstance(tensor, nn.Parameter) and not tensor.requires_grad):
                return moved
            return tensor.to(moved.device)

        return super()._apply(guarded, recurse)  # type: ignore[no-untyped-call]

    # The life cycle, in the order Lightning calls it

    def configure_callbacks(self) -> list[Callback]:
        """The best and the last state in the run folder, the end by the held-out loss, the learning rate as a curve."""
        found: list[Callback] = [
            ModelCheckpoint(
                dirpath=self.training_folder,
                filename=BEST,
                monitor=HELD_OUT,
                mode="min",
                save_last=True,
                auto_insert_metric_name=False,
                enable_version_counter=False,
            )
        ]
        if not any(isinstance(one, EarlyStopping) for one in self.trainer.callbacks):  # type: ignore[attr-defined]
            found.append(EarlyStopping(HELD_OUT, mode="min", patience=self.patience, check_on_train_epoch_end=False))
        if self.trainer.loggers:
            found.append(LearningRateMonitor("step"))
        return found

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine that ends with the run."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "learning rate"},
        }

    def _rate(self, steps_done: int) -> float:
        # The middle of the step to come: neither the first nor the last one is lost to a rate of 0.
        return cosine_with_warmup(progress_of(self.trainer, steps_done + 0.5), self.warmup)

    def on_fit_start(self) -> None:
        """The teacher goes where the student is."""
        for teacher in self._teacher:
            teacher.to(self.device)
        self._shown = 0.0
        self.progress.expect("training", SCALE)
        self._started = time.perf_counter()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of one batch of tokens int64 ``[B, L]``."""
        output = self._net(input_ids=batch, use_cache=False, output_hidden_states=self.hidden_weight > 0)
        loss = text = _next_token_loss(output.logits, batch)
        parts = {"train/text": text}
        if self.needs_teacher:
            with torch.no_grad():
                target = self._teacher[0](input_ids=batch, use_cache=False, output_hidden_states=self.hidden_weight > 0)
            parts["train/divergence"] = logit_distillation(output.logits, target.logits, self.temperature)
            loss = (1 - self.distillation) * text + self.distillation * parts["train/divergence"]
            if self.hidden_weight > 0:
                pairs = matching_states(output.hidden_states, target.hidden_states, self._layers)
                parts["train/hidden states"] = hidden_distillation(*pairs)
                loss = loss + self.hidden_weight * parts["train/hidden states"]
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss is {float(loss)} after {self.tokens_seen:,} tokens. Lower --model.learning_rate, or train "
                "in another --trainer.precision."
            )
        self.tokens_seen += batch.numel()
        self.log_dict(parts | {"train/loss": loss, "tokens seen": float(self.tokens_seen)}, batch_size=len(batch))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell the bar."""
        done = progress_of(self.trainer, self.trainer.global_step) * SCALE
        self.progress.advance("training", max(0.0, done - self._shown))
        self._shown = max(done, self._shown)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Cross-entropy of the held-out text in nats per token, whatever the loss that is trained."""
        loss = _next_token_loss(self._net(input_ids=batch, use_cache=False).logits, batch)
        self.log(HELD_OUT, loss, batch_size=len(batch), on_epoch=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained; the rest is in the pruned model's folder."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["tokens_seen"], checkpoint["seconds"] = self.tokens_seen, self.seconds_trained

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        self.tokens_seen, self.seconds_before = checkpoint["tokens_seen"], checkpoint["seconds"]

    @property
    def seconds_trained(self) -> float:
        """Wall-clock seconds of training so far, held-out loss included, over all processes of this run."""
        return self.seconds_before + time.perf_counter() - self._started

    def take_best(self, loss: float) -> float:
        """Put the state of the lowest held-out loss into the model, unless what it holds has a lower one.

        Args:
            loss: held-out loss of what it holds.

        Returns:
            The lower one.
        """
        kept = next(one for one in self.trainer.callbacks if isinstance(one, ModelCheckpoint))  # type: ignore[attr-defined]
        best = self.training_folder / f"{BEST}.ckpt"
        if kept.best_model_score is None or not best.is_file() or float(kept.best_model_score) >= loss:
            return loss
        found = torch.load(best, map_location="cpu", weights_only=True)
        self.load_state_dict(found["state_dict"], strict=False)
        return float(kept.best_model_score)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def merged(self) -> tuple[dict[str, Tensor], int | None]:
        """The trained model's parameters by name, adapters merged, and how many weights stayed zero (None: no mask).

        Raises:
            CheckpointError: a zeroed weight is not zero any more.
        """
        net: nn.Module = lora.merge(self._net, self._kept) if self.train_what == "lora" else self._net
        zeroed = None if self._kept is None else check_zeros(net, self._kept)
        state = {name: parameter.detach().cpu() for name, parameter in net.named_parameters()}
        self._net, self._teacher = None, []
        return state, zeroed


def _next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats, mean over tokens, fp32, of token t + 1 given tokens ≤ t."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())
