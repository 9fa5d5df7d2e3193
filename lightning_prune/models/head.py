"""Token losses from the last residual stream, a few tokens at a time: with a vocabulary of 128 000, the logits of a
window of 2048 tokens would take a GiB."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

LOGITS_BYTES = 128 * 2**20  # of one chunk of fp32 logits
Head = Callable[[Tensor], Tensor]  # final norm and output embedding, ``[n, D]`` → ``[n, V]``


def token_losses(head: Head, hidden: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """Cross-entropy in nats of token t + 1 given tokens ≤ t, fp32 ``[B, L − 1]`` whatever the model's dtype.

    Args:
        head: final norm and output embedding.
        hidden: residual stream after the last layer, ``[B, L, D]``.
        tokens: ``[B, L]`` int64.
        vocab_size: V.
    """
    losses = [
        functional.cross_entropy(head(rows).float(), targets, reduction="none")
        for rows, targets in chunks(hidden, tokens, vocab_size)
    ]
    return torch.cat(losses).view(len(tokens), -1)


def loss_gradient(head: Head, hidden: Tensor, tokens: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
    """∂(Σ token losses)/∂hidden, ``[B, L, D]`` in the dtype of ``hidden``; the arguments are those of ``token_losses``,
    and ``weight`` ``[B]``, 0 for samples that do not count, as those which only give every process equally many.

    The loss is summed, not averaged: a mean over thousands of tokens would push fp16 gradients below what it can say.
    """
    batch, length = tokens.shape
    gradient = torch.zeros_like(hidden)
    if length < 2:
        return gradient
    counts = (weight > 0).float().repeat_interleave(length - 1)
    gradients, start = [], 0
    for rows, targets in chunks(hidden, tokens, vocab_size):
        leaf = rows.detach().requires_grad_(True)
        with torch.enable_grad():
            losses = functional.cross_entropy(head(leaf).float(), targets, reduction="none")
            total = (losses * counts[start : start + len(rows)]).sum()
        gradients.append(torch.autograd.grad(total, leaf)[0])
        start += len(rows)
    gradient[:, :-1] = torch.cat(gradients).view(batch, length - 1, -1)
    return gradient


def chunks(hidden: Tensor, tokens: Tensor, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows ``[n, D]`` that predict something, and the tokens ``[n]`` they predict."""
    size = max(1, LOGITS_BYTES // (4 * vocab_size))
    rows, targets = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    for start in range(0, len(rows), size):
        yield rows[start : start + size], targets[start : start + size]
