"""Perplexity over packed windows: every token of a window but its first is predicted once."""

import torch
from torch import Tensor
from torchmetrics import Metric


class Perplexity(Metric):
    """exp(mean token loss); the sums are fp64 and int64, so batching and ranks do not change the value."""

    full_state_update = False
    loss_sum: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, weight: Tensor) -> None:
        """Add a batch: token losses ``[B, L − 1]``, weight ``[B]`` with 0 for samples that only give every
        process equally many."""
        counted = losses[weight > 0]
        self.loss_sum += counted.double().sum()
        self.tokens += counted.numel()

    def compute(self) -> Tensor:
        """Perplexity, fp64 scalar; NaN when nothing was seen."""
        return torch.exp(self.loss_sum / self.tokens)
