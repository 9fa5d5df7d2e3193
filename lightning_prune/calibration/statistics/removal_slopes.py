"""What the loss would gain without a piece of a layer, from its gradient alone: no evaluation without the piece.

A piece (a layer, or one of its blocks) adds c to the residual stream, where the loss has the gradient g. For sample i
with the summed loss ℓ_i, to second order along c and with the empirical Fisher matrix g·gᵀ for the Hessian,

    ℓ_i(without) − ℓ_i ≈ −s_i + ½·s_i²,   s_i = Σ over tokens of g·c
"""

import torch
from torch import Tensor

from lightning_prune.calibration.statistics.token_statistic import TokenStatistic
from lightning_prune.support.devices import widened


class RemovalSlopes(TokenStatistic):
    """Σ s_i and Σ s_i² of the P ``pieces`` of one layer, itself the first: float64 ``[P]`` each."""

    slopes: Tensor
    squares: Tensor

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self.add_sum("slopes", pieces)
        self.add_sum("squares", pieces)

    def update(self, pieces: list[tuple[Tensor, Tensor]], tokens: int) -> None:
        """Add samples: for every piece the gradient g and what it adds c, ``[B, L, D]`` each; ``tokens`` that all of
        these samples predict."""
        slopes = torch.stack([widened((g.float() * c.float()).flatten(1).sum(1)) for g, c in pieces])
        self.slopes += slopes.sum(1)
        self.squares += slopes.square().sum(1)
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Δ ``[P]`` in nats per token: of the layer, then of its blocks in order."""
        return (0.5 * self.squares - self.slopes) / self.tokens
