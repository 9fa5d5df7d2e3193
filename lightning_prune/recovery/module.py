"""The LightningModule that trains a pruned model to give back what pruning took."""

import math
from functools import cached_property
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.model_slot import DTYPES
from lightning_prune.models.weights import OPTION
from lightning_prune.recovery.weights import attach_adapters, count_zeros, hold_zeros, zeros_of
from lightning_prune.support.errors import UserError
from lightning_prune.support.progress import Progress
from lightning_prune.support.timing import Seconds

HELD_OUT = "held_out/loss"
MOST = 1000.0  # of a learning rate, a decay: with a larger one no weight would be finite
SCALE = 1000.0  # the bar's units for the whole of training


class Recovery(L.LightningModule):
    """Trains low-rank adapters or all weights of a pruned model, on text and by what the dense model predicts.

    Args:
        pretrained: The ``pruned`` folder of a finished run, such as logs/wanda/version_0/pruned.
        train: ``lora`` trains low-rank adapters on every linear of the layers and merges them at the end, ``all``
            trains all weights.
        distillation: Share of the loss that is the divergence from the dense model's predictions, 0 … 1; the rest is
            the cross-entropy of the text. With 0 no teacher is loaded.
        teacher: The dense model to learn from. Default: the one that was pruned.
        learning_rate: Peak; reached after the warm-up, 0 at the end of the run (by steps or by time, whichever ends
            it).
        warmup: Share of the run in which the learning rate rises.
        weight_decay: Of AdamW.
        lora_rank: Rank of the adapters, whose sum is scaled by 2.
        patience: Measurements of the held-out loss without a better one after which training ends.
        label: Name of this system in run folders, TensorBoard and tables. Default: the pruning run's with _lora or
            _full.
    """

    def __init__(
        self,
        pretrained: str = "",
        train: Literal["lora", "all"] = "lora",
        distillation: float = 0.5,
        teacher: str | None = None,
        learning_rate: float = 1e-3,
        warmup: float = 0.05,
        weight_decay: float = 0.0,
        lora_rank: int = 16,
        patience: int = 3,
        label: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, fine, allowed in (
            ("distillation", distillation, 0 <= distillation <= 1, "a share from 0 to 1"),
            ("learning_rate", learning_rate, 0 < learning_rate <= MOST, f"a number above 0, at most {MOST:g}"),
            ("warmup", warmup, 0 <= warmup < 1, "a share of the run from 0 to below 1"),
            ("weight_decay", weight_decay, 0 <= weight_decay <= MOST, f"a number from 0 to {MOST:g}"),
            ("lora_rank", lora_rank, lora_rank >= 1, "a whole number of 1 or more"),
            ("patience", patience, patience >= 1, "a whole number of 1 or more"),
        ):
            if not fine:
                raise UserError(f"--model.{name}: found {value}; it must be {allowed}.")
        self.pretrained, self.train_what, self.teacher, self.label = pretrained, train, teacher, label or ""
        self.distillation, self.lora_rank, self.patience = distillation, lora_rank, patience
        self.learning_rate, self.warmup, self.weight_decay = learning_rate, warmup, weight_decay
        self.strict_loading = False  # what is not trained is in the checkpoint folder already
        self.progress = Progress(shown=False)
        self.seconds = Seconds()
        self.tokens_seen = 0
        self._shown = 0.0  # of the bar
        self._net: Any = None
        self._zeros: dict[str, Tensor] | None = None
        self._teacher: list[nn.Module] = []  # not a submodule: it is neither trained nor saved

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of the pruned model to train, opened once."""
        return Checkpoint.open(self.pretrained)

    def open(self, precision: str, base_model: str, sha256: str | None, masked: bool) -> None:
        """Load the pruned model and, where the loss needs it, the dense one: ``base_model``, whose weights had
        ``sha256`` when it was pruned, unless ``teacher`` names another. ``masked``: weights that are zero stay zero.

        Raises:
            UserError: a model that cannot be loaded or has changed, or a precision that cannot be trained.
        """
        if precision in ("bf16-true", "16-true") and self.train_what == "all":
            raise UserError(
                f"--trainer.precision {precision} rounds most steps of an optimizer away when all weights are trained "
                "in it. Choose bf16-mixed or 32-true, or --model.train lora, whose adapters stay in fp32."
            )
        widest = max(max(entry.shape, default=1) for entry in self.checkpoint.tensors.values())
        if self.lora_rank > widest:
            raise UserError(f"--model.lora_rank: found {self.lora_rank}; no matrix here is wider than {widest}.")
        with self.seconds.measure("load"):
            net: Any = self.checkpoint.load(DTYPES[precision])
            self._zeros = zeros_of(net) if masked else None
            if self.train_what == "lora":
                self._net = attach_adapters(net, self.lora_rank, keep_zeros=masked)
            else:
                self._net = net.requires_grad_(True)
                hold_zeros(net, self._zeros or {})
            if self.distillation > 0:
                self.teacher, sha256 = (self.teacher, None) if self.teacher else (base_model, sha256)
                self._teacher = [self._load_teacher(self.teacher, sha256, DTYPES[precision])]

    def _load_teacher(self, name: str, sha256: str | None, dtype: torch.dtype) -> nn.Module:
        try:
            dense = Checkpoint.open(name)
            if sha256 not in (None, dense.fingerprint):
                raise UserError(
                    f"{OPTION}: '{name}' has changed since it was pruned (SHA-256). Give the unchanged dense model "
                    f"with {OPTION}."
                )
            teacher: Any = dense.load(dtype)
            sizes = teacher.config.vocab_size, self._net.config.vocab_size
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"{OPTION}: '{name}' has a vocabulary of {sizes[0]}, the pruned model {sizes[1]}. Give a teacher "
                    "with the same vocabulary."
                )
        except UserError as error:
            raise UserError(
                str(error).replace(OPTION, "--model.teacher") + " Or train without it: --model.distillation 0."
            ) from None
        return teacher.requires_grad_(False)  # type: ignore[no-any-return]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Cast frozen parameters only: in half precisions rotary tables and what is trained stay fp32."""

        def guarded(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            if moved.dtype == tensor.dtype or (isinstance(tensor, nn.Parameter) and not tensor.requires_grad):
                return moved
            return tensor.to(moved.device)

        return super()._apply(guarded, recurse)  # type: ignore[no-untyped-call]

    # The life cycle, in the order Lightning calls it

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)
        # The middle of the step to come: neither the first nor the last one is lost to a rate of 0.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda steps: cosine_with_warmup(progress_of(self.trainer, steps + 0.5), self.warmup)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step", "name": "learning rate"}]

    def on_fit_start(self) -> None:
        for teacher in self._teacher:
            teacher.to(self.device)
        self._shown = 0.0
        self.progress.expect("training", SCALE)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of one batch of tokens int64 ``[B, L]``."""
        logits = self._net(input_ids=batch, use_cache=False).logits
        loss = text = _next_token_loss(logits, batch)
        parts = {"train/text": text}
        for teacher in self._teacher:
            with torch.no_grad():
                target = teacher(input_ids=batch, use_cache=False).logits
            parts["train/divergence"] = divergence(logits, target)
            loss = (1 - self.distillation) * text + self.distillation * parts["train/divergence"]
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss is {float(loss)} after {self.tokens_seen:,} tokens. Lower --model.learning_rate, or train "
                "in another --trainer.precision."
            )
        self.tokens_seen += batch.numel()
        self.log_dict(parts | {"train/loss": loss, "tokens seen": float(self.tokens_seen)}, batch_size=len(batch))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
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
        checkpoint["tokens_seen"] = self.tokens_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen = checkpoint["tokens_seen"]

    def merged(self) -> tuple[dict[str, Tensor], int | None]:
        """The trained model's parameters by name, adapters merged, and how many weights stayed zero (None: no mask).

        Raises:
            CheckpointError: a zeroed weight is not zero any more.
        """
        net: nn.Module = self._net.merge_and_unload() if self.train_what == "lora" else self._net
        zeroed = None if self._zeros is None else count_zeros(net, self._zeros)
        self._net, self._teacher = None, []
        return {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}, zeroed


def _next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats, mean over tokens, fp32, of token t + 1 given tokens ≤ t."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p ‖ q) in nats, mean over tokens, with p = softmax(teacher) and q = softmax(student) in fp32 (Hinton, Vinyals,
    Dean 2015, section 2); of logits ``[B, L, V]``. No gradient flows into ``teacher``."""
    predicted = functional.log_softmax(student.float().flatten(0, -2), dim=-1)
    target = functional.log_softmax(teacher.detach().float().flatten(0, -2), dim=-1)
    return functional.kl_div(predicted, target, reduction="batchmean", log_target=True)


def cosine_with_warmup(progress: float, warmup: float) -> float:
    """Factor of the peak learning rate after a share ``progress`` of the run: linear up to 1 at the share ``warmup``
    (below 1), then half a cosine down to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def progress_of(trainer: L.Trainer, steps_done: float) -> float:
    """Share of the run that is done: of its steps, or of ``--trainer.max_time`` where that ends first."""
    total = trainer.estimated_stepping_batches
    done = steps_done / total if 0 < total < math.inf else 0.0
    for timer in (one for one in trainer.callbacks if isinstance(one, Timer)):  # type: ignore[attr-defined]
        spent, left = timer.time_elapsed(), timer.time_remaining()
        done = done if left is None else max(done, spent / max(spent + left, 1e-9))
    return min(done, 1.0)
