"""‖X_j‖₂ of every input channel of a linear, over all calibration tokens (Wanda, H-GSP's ``wanda`` importance)."""

import torch
from torch import Tensor

from lightning_prune.calibration.statistics.token_statistic import TokenStatistic


class SumOfSquares(TokenStatistic):
    """Σ_t x_tj² per input channel j.

    Squares are taken in fp32, after the cast: in fp16 an activation of 256 already overflows. They are summed over the
    tokens of a sample in fp32 and over samples in float64 ``[in]``: so the result depends on the split into batches by
    1e-16, where fp32 alone would stop growing after some 10⁷ tokens.
    """

    sum_of_squares: Tensor

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.add_state("sum_of_squares", torch.zeros(in_features, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add inputs x ``[B, ..., in]`` of any dtype; samples whose weight ``[B]`` is 0 are dropped."""
        kept = (x if weight is None else x[weight > 0]).detach()
        squares = kept.float().square().flatten(1, -2)
        self.sum_of_squares += squares.sum(1).sum(0, dtype=torch.float64)
        self.tokens += squares.shape[:2].numel()

    def compute(self) -> Tensor:
        """Σ_t x_tj², float64 ``[in]``, over all processes."""
        return self.sum_of_squares

    def norms(self) -> Tensor:
        """‖X_j‖₂, float64 ``[in]``. A sum over tokens, not a mean: twice the data gives √2 times the norm."""
        total = self.reduced()
        return total.reshape(-1).sqrt()  # torchmetrics returns a scalar for a single channel
