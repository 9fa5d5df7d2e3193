"""The loss that every method and measurement here means."""

from torch import Tensor
from torch.nn import functional


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats of token t + 1 given tokens ≤ t, in fp32 whatever the model's dtype.

    Args:
        logits: ``[B, L, V]``, any float dtype.
        tokens: ``[B, L]`` int64.

    Returns:
        fp32 ``[B, L − 1]``.
    """
    flat = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(tokens.shape[0], -1)
