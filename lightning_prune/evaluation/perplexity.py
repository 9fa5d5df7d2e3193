"""Perplexity over packed windows: every token of a window but its first is predicted once."""

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats of token t + 1 given tokens ≤ t, in fp32 whatever the model's dtype.

    Args:
        logits: ``[B, L, V]``, any float dtype.
        tokens: ``[B, L]`` int64.

    Returns:
        fp32 ``[B, L − 1]``.
    """
    flat = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(tokens.shape[0], -1)


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
