"""Mean and variance of every input channel of a linear, over all calibration tokens (FLAP)."""

import torch
from torch import Tensor

from lightning_prune.calibration.statistics.token_statistic import TokenStatistic


class InputMoments(TokenStatistic):
    """Σ_t x_tj and Σ_t x_tj² per input channel j, in float64 ``[in]``.

    Within a sample, squares are taken around the sample's mean, in fp32; what the means add is float64. So the variance
    of a channel that hardly moves about a large mean survives, which Σx² in fp32 would lose.
    """

    sums: Tensor
    squares: Tensor

    def __init__(self, in_features: int) -> None:
        super().__init__()
        for name in ("sums", "squares"):
            self.add_state(name, torch.zeros(in_features, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add inputs x ``[B, ..., in]`` of any dtype; samples whose weight ``[B]`` is 0 are dropped."""
        kept = (x if weight is None else x[weight > 0]).detach().float().flatten(1, -2)
        mean = kept.mean(1, keepdim=True)
        around = (kept - mean).square().sum(1).double()
        mean, length = mean[:, 0].double(), kept.shape[1]
        self.sums += (length * mean).sum(0)
        self.squares += (around + length * mean.square()).sum(0)
        self.tokens += kept.shape[:2].numel()

    def compute(self) -> Tensor:
        """x̄ and v, float64 ``[2, in]``; v = Σ_t (x_tj − x̄_j)² / (n − 1)."""
        count = self.tokens.double()
        mean = self.sums / count
        return torch.stack([mean, ((self.squares - count * mean.square()) / (count - 1)).clamp_min(0)])
