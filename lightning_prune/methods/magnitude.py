"""Magnitude pruning of groups: the weights that are small go, no data is read."""

from torch import Tensor

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Holding, Load, Pass, WeightsPass
from lightning_prune.calibration.statistics.groups import group_importance
from lightning_prune.methods.mask_pruning import GroupOrMaskPruning, MaskRule, mask_holding, mask_layer
from lightning_prune.models.families import LayerStructure


def magnitude_scores(weight: Tensor) -> Tensor:
    """|w|, fp32 ``[out, in]``."""
    return weight.float().abs()


class MagnitudePass(WeightsPass):
    """I(G) = Σ |w| over every weight of the group."""

    name = "importance"

    def conclude(self, view: LayerStructure) -> LayerResult:
        return LayerResult(group_importance(view, lambda role: magnitude_scores(view.linears[role].weight)))


class MagnitudeMaskPass(WeightsPass):
    """Zeroes the smallest weights of each whole matrix (the usual baseline), or n:m."""

    name = "masks"
    changes = True

    def __init__(self, rule: MaskRule) -> None:
        self.rule = rule

    def conclude(self, view: LayerStructure) -> LayerResult:
        return mask_layer(view, self.rule, lambda role: magnitude_scores(view.linears[role].weight))

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        return mask_holding(super().holds(view, load), load)


class Magnitude(GroupOrMaskPruning):
    """Magnitude: importance of a group = sum of the absolute values of its weights. Reads no data."""

    masks_per_tensor = True

    @property
    def measures_text(self) -> bool:
        return False

    def passes(self) -> list[Pass]:
        return [MagnitudePass()] if self.masks is None else [MagnitudeMaskPass(self.mask_rule(self.masks))]
