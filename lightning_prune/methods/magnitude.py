"""Magnitude pruning of groups: the weights that are small go, no data is read."""

from torch import Tensor

from lightning_prune.methods.group_pruning import GroupPruning
from lightning_prune.surgery.anatomy import LayerAnatomy
from lightning_prune.surgery.groups import attention_group_sums, mlp_channel_sums


def magnitude_importance(layer: LayerAnatomy) -> tuple[Tensor, Tensor]:
    """I(G) = Σ |w| over every weight of the group.

    Returns:
        ``[K]`` per GQA group and ``[F]`` per MLP channel, fp32.
    """
    size = {role: linear.weight.float().abs() for role, linear in layer.linears.items()}
    return (
        attention_group_sums(size["query"], size["key"], size["value"], size["output"], layer.num_kv_heads),
        mlp_channel_sums(size["gate"], size["up"], size["down"]),
    )


class Magnitude(GroupPruning):
    """Magnitude: importance of a group = sum of the absolute values of its weights. Reads no data."""

    needs_calibration = False

    def importances(self) -> tuple[list[Tensor], list[Tensor]]:
        """Sums of |w| for every layer."""
        pairs = [magnitude_importance(layer) for layer in self.layers]
        return [groups for groups, _ in pairs], [channels for _, channels in pairs]
