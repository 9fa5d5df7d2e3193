"""A decision laid over the dense model: its weights without the units that go, in the dense shape."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import OUTPUT_ROLE, Block


class InMemoryPlan:
    """Changes a layer that has just come in as a plan would: the model then computes what the cut one computes.

    Columns of o_proj and down_proj that belong to a unit that goes are zero, so nothing of it reaches the residual
    stream; its other weights stay, and count for nothing.

    Args:
        kept: of every layer.
        new_weights: dense layer → what was made of its weights, by role and of the dense shape, and ``<role>.bias``.
    """

    def __init__(self, kept: Sequence[LayerPlan], new_weights: Callable[[int], dict[str, Tensor]]) -> None:
        self.kept, self.new_weights = kept, new_weights

    def __call__(self, view: LayerStructure) -> None:
        """Change the layer of ``view``, whose weights are present."""
        new = self.new_weights(view.index)
        plan = self.kept[view.index]
        for role, units, count in (
            (OUTPUT_ROLE[Block.ATTENTION], plan.kept_kv_heads, view.num_kv_heads),
            (OUTPUT_ROLE[Block.MLP], plan.kept_channels, view.num_channels),
        ):
            projection = view.linears[role]
            weight = new.get(role, projection.weight).to(projection.weight)
            stays = torch.zeros(count, dtype=torch.bool)
            stays[units] = True
            columns = stays.repeat_interleave(projection.in_features // count).to(weight.device)
            projection.weight = torch.where(columns, weight, torch.zeros_like(weight))
            bias = new.get(f"{role}.bias", projection.bias)
            if bias is not None:
                bias = bias if units else torch.zeros_like(bias)
                projection.module.bias = nn.Parameter(bias.to(projection.weight), requires_grad=False)
        for role in new.keys() & view.linears.keys() - set(OUTPUT_ROLE.values()):
            projection = view.linears[role]
            projection.weight = new[role].to(projection.weight)
