"""A plan applied to the dense model in memory: its weights without the removed units, in the dense shape."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_prune.checkpoint.expert_plans import kept_experts
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.checkpoint.pruned import NewWeights
from lightning_prune.models.experts import ROLE, Experts
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import OUTPUT_ROLE


class InMemoryPlan:
    """Changes a layer that has just been loaded: the model then computes what the cut one computes.

    Columns of o_proj and down_proj that belong to a removed unit are zero, so nothing of it reaches the residual
    stream; its other weights stay, and count for nothing. A removed mixer is zero throughout; a removed layer does
    not scale the stream.

    Args:
        kept: of every layer.
        new_weights: see ``PrunedSource``.
    """

    def __init__(self, kept: Sequence[LayerPlan], new_weights: NewWeights) -> None:
        self.kept, self.new_weights = kept, new_weights

    def __call__(self, view: LayerStructure) -> None:
        """Change the layer of ``view``, whose weights are present."""
        new, kept = self.new_weights(view.index), self.kept[view.index]
        for block in view.prunable:
            units, projection, role = kept.kept[block], view.projection(block), OUTPUT_ROLE[block]
            if not view.units(block):
                continue
            weight = new.get(role, projection.weight).to(projection.weight)
            keeps = torch.zeros(view.units(block), dtype=torch.bool)
            keeps[units] = True
            columns = keeps.repeat_interleave(projection.in_features // len(keeps)).to(weight.device)
            projection.weight = torch.where(columns, weight, torch.zeros_like(weight))
            bias = new.get(f"{role}.bias", projection.bias)
            if bias is not None:
                bias = bias if units else torch.zeros_like(bias)
                projection.module.bias = nn.Parameter(bias.to(projection.weight), requires_grad=False)
        if kept.removed:
            whole = (part for block, part in view.parts.items() if block not in view.prunable)
            for parameter in (one for part in whole for module in part.modules for one in module.parameters()):
                parameter.data = torch.zeros_like(parameter)
            if view.scale:
                scale = getattr(view.layer, view.scale)
                scale.data = torch.ones_like(scale)
        elif view.experts is not None:
            mask_experts(view.experts, kept, new.get(ROLE))
        for role in new.keys() & view.linears.keys() - set(OUTPUT_ROLE.values()):
            projection = view.linears[role]
            projection.weight = new[role].to(projection.weight)


def mask_experts(experts: Experts, kept: LayerPlan, down: Tensor | None = None) -> None:
    """Let experts, whose weights are present, compute what the cut ones compute: the router knows those that are kept,
    and removed channels are zero in the down projections, or in ``down``, which takes their place."""
    numbers, channels = kept_experts(experts, kept)
    if down is not None:
        experts.replace_down(experts.down_parameters(down))
    if channels is not None:
        keeps = torch.zeros(experts.total, experts.width, dtype=torch.bool).scatter_(1, channels, True)
        experts.replace_down(experts.masked_down(keeps))
    experts.route_to(numbers)
