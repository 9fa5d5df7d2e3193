"""‖X_j‖₂ of every input channel of a linear, over all calibration tokens (Wanda, H-GSP's ``wanda`` importance)."""

import torch
from torch import Tensor

from lightning_prune.statistics.token_statistic import TokenStatistic, counted_tokens


class SumOfSquares(TokenStatistic):
    """Σ_t x_tj² per input channel j.

    Squares are taken in fp32, after the cast: in fp16 an activation of 256 already overflows. The sum is float64
    ``[in]``: one vector per linear costs nothing, and the result then depends on the split into batches by 1e-16
    where fp32 would stop growing after some 10⁷ tokens.
    """

    sum_of_squares: Tensor

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.add_state("sum_of_squares", torch.zeros(in_features, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add inputs x ``[B, ..., in]`` of any dtype; samples whose weight ``[B]`` is 0 are dropped."""
        rows = counted_tokens(x, weight)
        self.sum_of_squares += rows.float().square().sum(0, dtype=torch.float64)
        self.tokens += len(rows)

    def compute(self) -> Tensor:
        """Σ_t x_tj², float64 ``[in]``, over all processes."""
        return self.sum_of_squares

    def norms(self) -> Tensor:
        """‖X_j‖₂, float64 ``[in]``. A sum over tokens, not a mean: twice the data gives √2 times the norm."""
        total = self.reduced()
        return total.reshape(-1).sqrt()  # torchmetrics returns a scalar for a single channel
