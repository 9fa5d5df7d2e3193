"""How far a model's next-token distributions are from the dense model's, on the same tokens. No label is needed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightning_prune.calibration.statistics.token_statistic import TokenStatistic
from lightning_prune.models.head import LOGITS_BYTES, Head, chunks
from lightning_prune.support.devices import widened

PIECE_BYTES = LOGITS_BYTES // 4  # of a piece of fp32 logits that is compared at a time, which takes six as large


@dataclass(frozen=True)
class Distance:
    """Means over tokens, p the dense model's distribution and q the other one's.

    Attributes:
        kl_divergence: Σ p ln(p / q), in nats.
        top1_agreement: share of tokens for which both have the same most probable one.
        expected_acceptance: Σ min(p, q), the share of q's tokens that p accepts when q drafts for it (Leviathan et al.
            2023, "Fast Inference from Transformers via Speculative Decoding", Corollary 3.6).
    """

    kl_divergence: float
    top1_agreement: float
    expected_acceptance: float


class Distances(TokenStatistic):
    """The means of ``Distance`` over the tokens that are predicted."""

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("sums", 3)

    def update(self, distances: Tensor, weight: Tensor) -> None:
        """Add a batch ``[B, L − 1, 3]`` of ``distances``; samples whose weight ``[B]`` is 0 are dropped."""
        counted = distances[weight > 0]
        self.sums += widened(counted).sum((0, 1))
        self.tokens += counted.shape[0] * counted.shape[1]

    def compute(self) -> Tensor:
        """The three means, fp64; NaN when nothing was seen. Rounding cannot take them out of their range."""
        kl, agreement, acceptance = self.sums / self.tokens
        return torch.stack([kl.clamp(min=0), agreement.clamp(0, 1), acceptance.clamp(0, 1)])

    def distance(self) -> Distance:
        """Over all processes."""
        return Distance(*self.reduced().tolist())


def distances(p: Tensor, q: Tensor) -> Tensor:
    """KL divergence, agreement of the most probable token and Σ min(p, q) of two sets of logits ``[n, V]``: fp32
    ``[n, 3]``."""
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    kl = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    agreement = log_p.argmax(-1) == log_q.argmax(-1)
    return torch.stack([kl, agreement.float(), torch.minimum(log_p, log_q).exp().sum(-1)], dim=-1)


def losses_and_distances(
    head: Head, hidden: Tensor, dense_head: Head, dense_hidden: Tensor, tokens: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """``token_losses`` of ``head`` and ``hidden``, and ``distances`` from the dense model, a few tokens at a time.

    Args:
        head, dense_head: final norm and output embedding of either model.
        hidden, dense_hidden: residual streams after the last layer, ``[B, L, D]``; D may differ.
        tokens: ``[B, L]`` int64.
        vocab_size: V of both.

    Returns:
        fp32 ``[B, L − 1]`` and ``[B, L − 1, 3]``.
    """
    losses, of_tokens, size = [], [], max(1, PIECE_BYTES // (4 * vocab_size))
    both = zip(chunks(hidden, tokens, vocab_size), chunks(dense_hidden, tokens, vocab_size), strict=True)
    for (rows, targets), (dense_rows, _) in both:
        q = head(rows).float()
        losses.append(functional.cross_entropy(q, targets, reduction="none"))
        for piece, dense_piece in zip(q.split(size), dense_rows.split(size), strict=True):
            of_tokens.append(distances(dense_head(dense_piece), piece))
    batch, length = tokens.shape
    return torch.cat(losses).view(batch, length - 1), torch.cat(of_tokens).view(batch, length - 1, 3)
