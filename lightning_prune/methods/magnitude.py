"""Magnitude pruning of groups: the weights that are small go, no data is read."""

from torch import Tensor

from lightning_prune.methods.mask_pruning import GroupOrMaskPruning
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


class Magnitude(GroupOrMaskPruning):
    """Magnitude: importance of a group = sum of the absolute values of its weights. Reads no data."""

    needs_calibration = False
    masks_per_tensor = True

    def importances(self) -> tuple[list[Tensor], list[Tensor]]:
        """Sums of |w| for every layer."""
        pairs = [magnitude_importance(layer) for layer in self.layers]
        return [groups for groups, _ in pairs], [channels for _, channels in pairs]

    def weight_scores(self, layer: LayerAnatomy, role: str) -> Tensor:
        """|w|, compared over each whole matrix (the usual baseline)."""
        return layer.linears[role].weight.float().abs()
