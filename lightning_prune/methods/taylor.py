"""Taylor importance of groups (LLM-Pruner, Ma et al. 2023, section 3.2; first order as in its ``param_first``).

Removing a weight w changes the loss L by about |w·g|, g = ∂L/∂w; the second-order variant adds ½·w²·h with h a diagonal
estimate of the curvature. L is the mean token loss over the whole calibration set, so g is summed with its sign and the
absolute value is taken once, at the end.
"""

from collections.abc import Mapping

from torch import Tensor

from lightning_prune.surgery.anatomy import LayerAnatomy
from lightning_prune.surgery.groups import attention_group_sums, mlp_channel_sums


def taylor_importance(layer: LayerAnatomy, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """I(G) = Σ |w·g| over every weight of the group.

    Args:
        layer: one decoder layer.
        gradients: g by role (query, key, value, output, gate, up, down), fp32, shaped like the weights.

    Returns:
        ``[K]`` per GQA group and ``[F]`` per MLP channel, fp32.
    """
    product = {role: (linear.weight.float() * gradients[role]).abs() for role, linear in layer.linears.items()}
    return (
        attention_group_sums(product["query"], product["key"], product["value"], product["output"], layer.num_kv_heads),
        mlp_channel_sums(product["gate"], product["up"], product["down"]),
    )


def second_order_term(weight: Tensor, sample_gradient: Tensor) -> Tensor:
    """½·w²·g_i² of one sample i; its mean over the samples is ½·w²·h with h = (1/N) Σ_i g_i².

    h is taken per sample, not per batch, because then it depends neither on the batch size nor on which samples share
    a batch. ½·w²·h is quadratically small: expect it to hardly move a ranking.
    """
    return 0.5 * (weight.float() * sample_gradient).square()
