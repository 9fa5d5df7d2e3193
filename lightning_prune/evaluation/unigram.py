"""The floor under every language model: token frequencies without any context."""

import torch
from torch import Tensor


def unigram_perplexity(tokens: Tensor) -> float:
    """Perplexity of the best unigram model on the predicted tokens, exp(H) with H their empirical entropy in nats.

    The frequencies are those of the evaluated tokens themselves, so no model without context can do better.

    Args:
        tokens: int64 ``[N, L]``; the first token of every window is not predicted and does not count.
    """
    _, counts = tokens[:, 1:].unique(return_counts=True)
    share = counts.double() / counts.sum()
    return float(torch.exp(-(share * share.log()).sum()))
