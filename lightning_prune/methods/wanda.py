"""Wanda (Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models") on groups.

The paper scores a weight by |W_ij| · ‖X_j‖₂, with ‖X_j‖₂ the l2 norm of input channel j over all calibration tokens.
Here the importance of a group is the sum of that score over every weight of the group.
"""

from typing import Any

from torch import Tensor

from lightning_prune.calibration.hooks import Hooks
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import ForwardPass, Holding, Load, Pass
from lightning_prune.calibration.statistics.channel_sums import SumOfSquares
from lightning_prune.calibration.statistics.groups import group_importance
from lightning_prune.methods.mask_pruning import GroupOrMaskPruning, MaskRule, mask_holding, mask_layer
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import INPUT_OF, Block


def weight_scores(weight: Tensor, input_norms: Tensor) -> Tensor:
    """S_ij = |W_ij| · ‖X_j‖₂ (Wanda, eq. 1).

    Args:
        weight: ``[out, in]``, any float dtype.
        input_norms: ``[in]``, any float dtype, l2 norm of each input channel over all calibration tokens.

    Returns:
        fp32 ``[out, in]``.
    """
    return weight.float().abs() * input_norms.float()


def wanda_importance(view: LayerStructure, norms: dict[str, Tensor]) -> dict[Block, Tensor]:
    """I(G) = Σ |W_ij| · ‖X_j‖₂ over every weight of the group, in all its projections.

    Args:
        view: one decoder layer.
        norms: input norms ``[in]`` by role: query, output, gate, down.

    Returns:
        ``[K]`` per GQA group and ``[F]`` per MLP channel, fp32.
    """
    return group_importance(view, lambda role: weight_scores(view.linears[role].weight, norms[INPUT_OF[role]]))


class InputNorms:
    """Collects the norms of a layer's four distinct inputs."""

    def __init__(self, view: LayerStructure, hooks: Hooks) -> None:
        self.layer = view.index
        self.sums: dict[str, SumOfSquares] = {}
        for role in sorted(set(INPUT_OF.values())):
            linear = view.linears[role]
            self.sums[role] = SumOfSquares(linear.in_features).to(linear.weight.device)
            hooks.on_input(self._name(role), linear.module, self.sums[role].update)

    def norms(self) -> dict[str, Tensor]:
        """‖X_j‖₂ fp64 ``[in]`` by the role that reads the input first: query, output, gate, down.

        Raises:
            FloatingPointError: an activation was NaN or infinite.
        """
        for role, statistic in self.sums.items():
            statistic.raise_if_not_finite(self._name(role))
        return {role: statistic.norms() for role, statistic in self.sums.items()}

    def _name(self, role: str) -> str:
        return f"layer {self.layer}, input of {role}"


class WandaPass(ForwardPass):
    """Group importance from the dense model's activations."""

    name = "importance"

    def observe(self, view: LayerStructure, hooks: Hooks) -> None:
        self.inputs = InputNorms(view, hooks)

    def conclude(self, view: LayerStructure) -> LayerResult:
        return LayerResult(wanda_importance(view, self.inputs.norms()))


class WandaMaskPass(WandaPass):
    """Zeroes the lowest-scored weights of each output row, or n:m.

    Args:
        rule: what is zeroed.
        sequential: calibrate each layer on the output of the masked layers before it, as the paper does; false takes
            all norms from the dense model.
    """

    name = "masks"
    changes = True  # though the next layer may be meant not to see it

    def __init__(self, rule: MaskRule, sequential: bool) -> None:
        self.rule, self.rewrites = rule, sequential

    def conclude(self, view: LayerStructure) -> LayerResult:
        norms = self.inputs.norms()
        return mask_layer(view, self.rule, lambda role: weight_scores(view.linears[role].weight, norms[INPUT_OF[role]]))

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        return mask_holding(super().holds(view, load), load)


class Wanda(GroupOrMaskPruning):
    """Wanda: importance of a group = sum of |weight| times the norm of the activation that the weight reads.

    Args:
        sequential: For masks: calibrate each layer on the output of the masked layers before it, as the paper does;
            false takes all norms from the dense model in one pass.
        options: Options of group and mask pruning.
    """

    def __init__(
        self, pretrained: str = "demo", pruning_ratio: float = 0.2, sequential: bool = True, **options: Any
    ) -> None:
        super().__init__(pretrained, pruning_ratio, **options)
        self.sequential = sequential

    def passes(self) -> list[Pass]:
        return [WandaPass()] if self.masks is None else [WandaMaskPass(self.mask_rule(self.masks), self.sequential)]

    def details(self) -> dict[str, Any]:
        return {**super().details(), **({} if self.masks is None else {"sequential": self.sequential})}
