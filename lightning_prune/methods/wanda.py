"""Wanda (Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models") on groups: the
importance of a group is the sum of the paper's score over every weight of the group."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_prune.calibration.hooks import Hooks
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import ForwardPass, Holding, Load, Pass
from lightning_prune.calibration.statistics.channel_sums import SumOfSquares
from lightning_prune.calibration.statistics.groups import group_importance
from lightning_prune.calibration.statistics.routed import RoutedOutputs
from lightning_prune.methods.experts import wanda as wanda_of_channels
from lightning_prune.methods.experts import with_experts
from lightning_prune.methods.mask_pruning import GroupOrMaskPruning, MaskRule, mask_layer
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import Block


def weight_scores(weight: Tensor, input_norms: Tensor) -> Tensor:
    """S_ij = |W_ij| · ‖X_j‖₂ (Wanda, eq. 1), fp32 ``[out, in]``; norms ``[in]`` are over all calibration tokens."""
    return weight.float().abs() * input_norms.float()


def wanda_importance(view: LayerStructure, norms: dict[str, Tensor]) -> dict[Block, Tensor]:
    """I(G) = Σ |W_ij| · ‖X_j‖₂ over every weight of the group, ``[K]`` per GQA group and ``[F]`` per MLP channel, fp32;
    ``norms`` ``[in]`` are those of what ``LayerStructure.read_with`` names."""
    return group_importance(view, lambda role: weight_scores(view.linears[role].weight, norms[view.read_with(role)]))


class WandaPass(ForwardPass):
    """Group importance from the dense model's activations.

    Args:
        rule: zeroes the lowest-scored weights of each output row, or all but n of every m, instead.
        sequential: with a rule, calibrate each layer on the output of the masked layers before it.
    """

    def __init__(self, rule: MaskRule | None = None, sequential: bool = True) -> None:
        self.rule, self.changes = rule, rule is not None  # also where the next layer is meant not to see it
        self.name = "masks" if self.changes else "importance"
        self.rewrites = rule is not None and sequential

    def observe(self, view: LayerStructure, hooks: Hooks) -> None:
        self.sums: dict[str, SumOfSquares] = {}
        for role in sorted(set(map(view.read_with, view.linears))):
            linear = view.linears[role]
            self.sums[role] = SumOfSquares(linear.in_features).to(linear.weight.device)
            hooks.on_input(f"layer {view.index}, input of {role}", linear.module, self.sums[role].update)
        self.routed = None if view.experts is None else RoutedOutputs(view.experts).to(self.model.device)
        if self.routed is not None:
            hooks.on_experts(f"layer {view.index}, experts", self.routed.experts[0].module, self.routed.update)

    def conclude(self, view: LayerStructure) -> LayerResult:
        for role, statistic in self.sums.items():
            statistic.raise_if_not_finite(f"layer {view.index}, input of {role}")
        norms = {role: statistic.norms() for role, statistic in self.sums.items()}
        if self.rule is None:
            dense = LayerResult(wanda_importance(view, norms))
            return with_experts(f"layer {view.index}", dense, self.routed, wanda_of_channels)
        return mask_layer(
            view, self.rule, lambda role: weight_scores(view.linears[role].weight, norms[view.read_with(role)])
        )

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        base, sums = super().holds(view, load), RoutedOutputs.bytes_of(view.experts)
        base = replace(base, running=base.running + sums, finishing=base.finishing + sums)
        return base if self.rule is None else self.rule.holding(base, load)


class Wanda(GroupOrMaskPruning):
    """Wanda: importance of a group = sum of |weight| times the norm of the activation that the weight reads.

    Args:
        sequential: For masks: calibrate each layer on the output of the masked layers before it, as the paper does;
            false takes all norms from the dense model in one pass.
        options: Options of group and mask pruning.
    """

    experts = True

    def __init__(
        self, pretrained: str = "demo", pruning_ratio: float = 0.2, sequential: bool = True, **options: Any
    ) -> None:
        super().__init__(pretrained, pruning_ratio, **options)
        self.sequential = sequential

    def passes(self) -> list[Pass]:
        return [WandaPass(self.mask_rule, self.sequential)]

    def details(self) -> dict[str, Any]:
        return {**super().details(), **({} if self.structure == "group" else {"sequential": self.sequential})}
