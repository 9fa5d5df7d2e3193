"""Magnitude pruning: small weights are removed, no data is read."""

from torch import Tensor

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Holding, Load, Pass, WeightsPass
from lightning_prune.calibration.statistics.groups import group_importance
from lightning_prune.methods.experts import magnitude as magnitude_of_channels
from lightning_prune.methods.mask_pruning import GroupOrMaskPruning, MaskRule, mask_layer
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import Block


class MagnitudePass(WeightsPass):
    """I(G) = Σ |w| over every weight of the group; with a ``rule`` the smallest weights are zeroed instead."""

    def __init__(self, rule: MaskRule | None = None) -> None:
        self.rule, self.changes = rule, rule is not None
        self.name = "masks" if self.changes else "importance"

    def conclude(self, view: LayerStructure) -> LayerResult:
        def size(role: str) -> Tensor:
            return view.linears[role].weight.float().abs()

        if self.rule is not None:
            return mask_layer(view, self.rule, size)
        importance = group_importance(view, size)
        if view.experts is not None:
            importance[Block.EXPERT_CHANNEL] = magnitude_of_channels(view.experts).flatten()
        return LayerResult(importance)

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        base = super().holds(view, load)
        return base if self.rule is None else self.rule.holding(base, load)


class Magnitude(GroupOrMaskPruning):
    """Magnitude: importance of a group = sum of the absolute values of its weights. Reads no data."""

    experts = True
    measures_text = False
    masks_per_tensor = True

    def passes(self) -> list[Pass]:
        return [MagnitudePass(self.mask_rule)]
