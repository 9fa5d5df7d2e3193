"""Norm, mean and variance of every input channel of a linear, over all calibration tokens."""

import torch
from torch import Tensor

from lightning_prune.calibration.statistics.token_statistic import TokenStatistic, counted_samples
from lightning_prune.support.devices import widened, widest


class SumOfSquares(TokenStatistic):
    """Σ_t x_tj² per input channel j (Wanda, H-GSP's ``wanda`` importance).

    Squares are taken in fp32: in fp16 an activation of 256 already overflows. They are summed over the tokens of a
    sample in fp32 and over samples in float64, where fp32 would stop growing after some 10⁷ tokens.
    """

    sum_of_squares: Tensor

    def __init__(self, in_features: int) -> None:
        super().__init__(sum_of_squares=(in_features,))

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add inputs x ``[B, ..., in]`` of any dtype; samples whose weight ``[B]`` is 0 are dropped."""
        squares = counted_samples(x, weight).float().square().flatten(1, -2)
        self.sum_of_squares += squares.sum(1).sum(0, dtype=widest(squares.device))
        self.tokens += squares.shape[:2].numel()

    def compute(self) -> Tensor:
        """Σ_t x_tj², float64 ``[in]``, over all processes."""
        return self.sum_of_squares

    def norms(self) -> Tensor:
        """‖X_j‖₂, float64 ``[in]``. A sum over tokens, not a mean: twice the data gives √2 times the norm."""
        return self.reduced().sqrt()


class InputMoments(TokenStatistic):
    """Σ_t x_tj and Σ_t x_tj² per input channel j, in float64 ``[in]`` (FLAP).

    Within a sample, squares are taken around its mean, in fp32; what the means add is float64: Σx² in fp32 would lose
    the variance of a channel that hardly moves about a large mean.
    """

    sums: Tensor
    squares: Tensor

    def __init__(self, in_features: int) -> None:
        super().__init__(sums=(in_features,), squares=(in_features,))

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add inputs x ``[B, ..., in]`` of any dtype; samples whose weight ``[B]`` is 0 are dropped."""
        kept = counted_samples(x, weight).float().flatten(1, -2)
        mean = kept.mean(1, keepdim=True)
        around = widened((kept - mean).square().sum(1))
        mean, length = widened(mean[:, 0]), kept.shape[1]
        self.sums += (length * mean).sum(0)
        self.squares += (around + length * mean.square()).sum(0)
        self.tokens += kept.shape[:2].numel()

    def compute(self) -> Tensor:
        """x̄ and v, float64 ``[2, in]``; v = Σ_t (x_tj − x̄_j)² / (n − 1)."""
        count = self.tokens.to(self.sums.dtype)
        mean = self.sums / count
        return torch.stack([mean, ((self.squares - count * mean.square()) / (count - 1)).clamp_min(0)])
