"""Block influence: how much a decoder layer turns the residual stream (ShortGPT)."""

import torch
from torch import Tensor

from lightning_prune.calibration.statistics.token_statistic import TokenStatistic, counted_samples
from lightning_prune.support.devices import widened


class BlockInfluence(TokenStatistic):
    """BI = 1 − mean_t cos(h_in,t, h_out,t), between 0 (the layer only rescales) and 2 (Men et al., 2024).

    The cosine with a zero vector counts as 0.5, as in the released code. Its hook is on the decoder layer: the last of
    ``output_hidden_states`` is taken after the final norm.
    """

    distance: Tensor

    def __init__(self) -> None:
        super().__init__(distance=())

    def update(self, x_in: Tensor, x_out: Tensor, weight: Tensor | None = None) -> None:
        """Add the residual stream before and after the layer, ``[B, ..., D]`` each; weight ``[B]`` 0 drops."""
        before, after = (counted_samples(x, weight).flatten(0, -2).float() for x in (x_in, x_out))
        dot = widened((before * after).sum(-1))
        # One root over the product in float64 is exact for x_out = x_in, so an identity layer gets BI = 0.
        norm = (widened(before.square().sum(-1)) * widened(after.square().sum(-1))).sqrt()
        cosine = torch.where(norm == 0, 0.5, dot / norm)
        self.distance += (1 - cosine).sum()
        self.tokens += len(before)

    def compute(self) -> Tensor:
        """BI, float64 scalar, over all processes; NaN before the first token."""
        return self.distance / self.tokens
