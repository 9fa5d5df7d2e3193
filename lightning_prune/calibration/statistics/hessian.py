"""XᵀX of a linear's inputs, from which SparseGPT and SlimGPT build their Hessian."""

import torch
from torch import Tensor

from lightning_prune.calibration.statistics.gram import add_gram_, mirror_upper_
from lightning_prune.calibration.statistics.token_statistic import TokenStatistic, counted_tokens, full_precision


class InputGram(TokenStatistic):
    """XᵀX ``[in, in]`` over the calibration tokens, fp32 (float64 would be 1 GB for the down of a 7B model).

    ``max_tokens``: count only the first so many tokens, in sample order, whatever the batch size; per process
    when there are several. None counts all.
    """

    gram: Tensor

    def __init__(self, in_features: int, max_tokens: int | None = None) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.add_matrix_state("gram", torch.Size((in_features, in_features)))

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add inputs x ``[B, ..., in]`` of any dtype; samples whose weight ``[B]`` is 0 are dropped."""
        rows = counted_tokens(x, weight)
        if self.max_tokens is not None:
            rows = rows[: max(0, self.max_tokens - int(self.tokens))]
        rows = rows.float()
        with full_precision(rows.device):
            add_gram_(self.gram, rows)
        self.tokens += len(rows)

    def compute(self) -> Tensor:
        """XᵀX, whole: while tokens are counted only its upper triangle is kept up."""
        mirror_upper_(self.gram)
        return self.gram

    def matrix(self) -> Tensor:
        """The same over all processes, fp32 ``[in, in]`` for one channel too, where torchmetrics returns a scalar."""
        return self.reduced().reshape(self.gram.shape)
