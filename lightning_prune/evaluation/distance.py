"""How far a model's next-token distributions are from the dense model's, on the same tokens. No label is needed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightning_prune.calibration.statistics.token_statistic import TokenStatistic
from lightning_prune.models.head import LOGITS_BYTES, Head, chunks
from lightning_prune.support.devices import widened

DENSE_BYTES = LOGITS_BYTES // 4  # of the dense model's fp32 logits that are there at a time
PIECE_BYTES = 2**22  # of the fp32 logits that are compared at a time: larger ones leave a CPU's caches


@dataclass(frozen=True)
class Distance:
    """Means over tokens, p the dense model's distribution and q the other one's."""

    kl_divergence: float  # Σ p ln(p / q), in nats
    top1_agreement: float  # share of tokens for which both have the same most probable one
    # Σ min(p, q): the share of q's tokens that p accepts when q drafts for it (Leviathan et al. 2023, "Fast Inference
    # from Transformers via Speculative Decoding", Corollary 3.6)
    expected_acceptance: float


class TokenMeans(TokenStatistic):
    """Means over the predicted tokens, every one but a window's first: of the loss, and of the values of ``Distance``
    where there is another model."""

    sums: Tensor

    def __init__(self, values: int) -> None:
        super().__init__(sums=(values,))

    def update(self, weight: Tensor, *values: Tensor) -> None:
        """Add a batch ``[B, L − 1]`` of every value; samples whose weight ``[B]`` is 0 are dropped."""
        counted = [value[weight > 0] for value in values]
        self.sums += torch.stack([widened(value).sum() for value in counted])
        self.tokens += counted[0].numel()

    def compute(self) -> Tensor:
        """fp64 ``[values]``; NaN when nothing was seen."""
        return self.sums / self.tokens

    def perplexity(self) -> float:
        """exp(mean loss) over all processes."""
        return float(self.reduced()[0].exp())

    def distance(self) -> Distance:
        """The ``Distance`` over all processes, clamped to its range against rounding."""
        _, kl, agreement, acceptance = self.reduced()
        return Distance(float(kl.clamp(min=0)), float(agreement.clamp(0, 1)), float(acceptance.clamp(0, 1)))


def distances(p: Tensor, q: Tensor) -> Tensor:
    """KL divergence, agreement of the most probable token and Σ min(p, q) of two sets of logits ``[n, V]``: fp32
    ``[3, n]``."""
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    kl = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    agreement = log_p.argmax(-1) == log_q.argmax(-1)
    return torch.stack([kl, agreement.float(), torch.minimum(log_p, log_q).exp().sum(-1)])


def losses_and_distances(
    head: Head, hidden: Tensor, dense_head: Head, dense_hidden: Tensor, tokens: Tensor, vocab_size: int
) -> list[Tensor]:
    """``token_losses`` of ``head`` and ``hidden``, and the three ``distances`` from the dense model, a few tokens at a
    time: fp32 ``[B, L − 1]`` each. ``hidden`` and ``dense_hidden`` are residual streams after the last layer, ``[B, L,
    D]``, whose D may differ; ``tokens`` int64 ``[B, L]``."""
    losses, of_tokens = [], []
    held, compared = (max(1, most // (4 * vocab_size)) for most in (DENSE_BYTES, PIECE_BYTES))
    chunked = zip(chunks(hidden, tokens, vocab_size), chunks(dense_hidden, tokens, vocab_size), strict=True)
    for (rows, targets), (dense_rows, _) in chunked:
        q = head(rows).float()
        losses.append(functional.cross_entropy(q, targets, reduction="none"))
        for some_q, some_rows in zip(q.split(held), dense_rows.split(held), strict=True):
            p = dense_head(some_rows)
            of_tokens += [distances(*both) for both in zip(p.split(compared), some_q.split(compared), strict=True)]
    shape = (len(tokens), tokens.shape[1] - 1)
    return [value.view(shape) for value in (torch.cat(losses), *torch.cat(of_tokens, dim=1))]
