"""Perplexity over packed windows: every token of a window but its first is predicted once."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_prune.statistics.token_loss import token_losses


class Perplexity(Metric):
    """exp(mean token loss); the sums are fp64 and int64, so batching and ranks do not change the value."""

    full_state_update = False
    loss_sum: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, tokens: Tensor, weight: Tensor) -> None:
        """Add a batch: logits ``[B, L, V]``, tokens ``[B, L]``, weight ``[B]`` with 0 for padding samples."""
        losses = token_losses(logits, tokens)[weight > 0]
        self.loss_sum += losses.double().sum()
        self.tokens += losses.numel()

    def compute(self) -> Tensor:
        """Perplexity, fp64 scalar; NaN when nothing was seen."""
        return torch.exp(self.loss_sum / self.tokens)
