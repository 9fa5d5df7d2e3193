"""XᵀX of a linear's inputs, from which SparseGPT and SlimGPT build their Hessian.

It is symmetric, so only the blocks on and above the diagonal are computed: half the work of a full product.
"""

import torch
from torch import Tensor

from lightning_prune.calibration.statistics.token_statistic import TokenStatistic, counted_samples, full_precision

BLOCK = 256  # measured: wider ones save less, narrower ones are slower (docs/notes/speed.md)
MIRROR_BLOCK = 512  # its squares are copied thrice


class InputGram(TokenStatistic):
    """XᵀX ``[in, in]`` over the calibration tokens, fp32 (float64 would be 1 GB for the down of a 7B model); of every
    process's first ``max_tokens`` tokens in sample order, whatever the batch size, or of all."""

    gram: Tensor

    def __init__(self, in_features: int, max_tokens: int | None = None) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self._seen = 0  # ``tokens`` on the host: asking a device for it would wait for all that it has to do
        self.add_matrix_state("gram", in_features, in_features)

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add inputs x ``[B, ..., in]`` of any dtype; samples whose weight ``[B]`` is 0 are dropped."""
        rows = counted_samples(x, weight).flatten(0, -2)
        if self.max_tokens is not None:
            rows = rows[: max(0, self.max_tokens - self._seen)]
        rows = rows.float()
        with full_precision(rows.device):
            add_gram_(self.gram, rows)
        self.tokens += len(rows)
        self._seen += len(rows)

    def compute(self) -> Tensor:
        """XᵀX, whole: while tokens are counted only its upper triangle is kept up."""
        mirror_upper_(self.gram)
        return self.gram

    def matrix(self) -> Tensor:
        """The same over all processes, fp32 ``[in, in]``."""
        return self.reduced()


def add_gram_(gram: Tensor, rows: Tensor) -> None:
    """Add XᵀX, of ``rows`` X ``[T, n]``, to the upper triangle of ``gram`` ``[n, n]``; what is below the diagonal is
    undefined until ``mirror_upper_``."""
    for start in range(0, len(gram), BLOCK):
        stop = start + BLOCK
        add_product_(gram[start:stop, start:], rows[:, start:stop].T, rows[:, start:])


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total``. Where that is wider, the product is made in the narrower dtype: of a batch's
    tokens in fp32, which is twice as fast as float64 and up to 64 times on a GPU, and only the sum over batches is
    long enough to need more."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right)


def mirror_upper_(gram: Tensor) -> None:
    """Copy what is above the diagonal of ``gram`` ``[n, n]`` below it, in place and without an n × n temporary."""
    for start in range(0, len(gram), MIRROR_BLOCK):
        stop = start + MIRROR_BLOCK
        square = gram[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        gram[stop:, start:stop] = gram[start:stop, stop:].T
