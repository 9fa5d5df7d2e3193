"""Wanda (Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models") on groups.

The paper scores a weight by |W_ij| · ‖X_j‖₂, with ‖X_j‖₂ the l2 norm of input channel j over all calibration tokens.
Here the importance of a group is the sum of that score over every weight of the group.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_prune.methods.mask_pruning import GroupOrMaskPruning
from lightning_prune.statistics.hooks import Hooks
from lightning_prune.statistics.input_norms import SumOfSquares
from lightning_prune.surgery.anatomy import LayerAnatomy
from lightning_prune.surgery.groups import attention_group_sums, mlp_channel_sums

# Projections that read the same activation share one statistic, collected at the first of them.
INPUT_OF = {
    "query": "query",
    "key": "query",
    "value": "query",
    "output": "output",
    "gate": "gate",
    "up": "gate",
    "down": "down",
}


def weight_scores(weight: Tensor, input_norms: Tensor) -> Tensor:
    """S_ij = |W_ij| · ‖X_j‖₂ (Wanda, eq. 1).

    Args:
        weight: ``[out, in]``, any float dtype.
        input_norms: ``[in]`` fp32, l2 norm of each input channel over all calibration tokens.

    Returns:
        fp32 ``[out, in]``.
    """
    return weight.float().abs() * input_norms.float()


def wanda_importance(layer: LayerAnatomy, norms: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """I(G) = Σ |W_ij| · ‖X_j‖₂ over every weight of the group, in all its projections.

    Args:
        layer: one decoder layer.
        norms: input norms ``[in]`` by role: query, output, gate, down.

    Returns:
        ``[K]`` per GQA group and ``[F]`` per MLP channel, fp32.
    """
    score = {role: weight_scores(linear.weight, norms[INPUT_OF[role]]) for role, linear in layer.linears.items()}
    return (
        attention_group_sums(score["query"], score["key"], score["value"], score["output"], layer.num_kv_heads),
        mlp_channel_sums(score["gate"], score["up"], score["down"]),
    )


class InputNorms(nn.Module):
    """Collects the input norms of every layer's projections during one pass."""

    def __init__(self, layers: Sequence[LayerAnatomy], hooks: Hooks) -> None:
        super().__init__()
        self.sums = nn.ModuleDict()
        for layer in layers:
            for role in sorted(set(INPUT_OF.values())):
                linear = layer.linears[role]
                statistic = SumOfSquares(linear.in_features).to(linear.weight.device)
                self.sums[f"{layer.index}_{role}"] = statistic
                hooks.on_input(f"layer {layer.index}, input of {role}", linear, statistic.update)

    def of(self, layer: int) -> dict[str, Tensor]:
        """‖X_j‖₂ fp64 ``[in]`` of one layer, by the role that reads the input first: query, output, gate, down.

        Raises:
            FloatingPointError: an activation was NaN or infinite.
        """
        found = {}
        for role in sorted(set(INPUT_OF.values())):  # the same order in every process: each step is a reduction
            statistic: SumOfSquares = self.sums[f"{layer}_{role}"]  # type: ignore[assignment]
            statistic.raise_if_not_finite(f"layer {layer}, input of {role}")
            found[role] = statistic.norms()
        return found


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

    @property
    def layerwise(self) -> bool:
        """Group scores come from the dense model in one pass; the paper's masks from one layer after the other."""
        return self.masked and self.sequential

    def attach(self) -> None:
        """Watch the four distinct inputs of every layer, or of this epoch's layer."""
        self.norms = InputNorms([self.current_layer] if self.layerwise else self.layers, self.hooks)

    def finish_epoch(self) -> None:
        """Sequential masks: mask this layer, so that the next one sees what it puts out."""
        if self.layerwise:
            self.mask_layer(self.current_layer)

    def importances(self) -> tuple[list[Tensor], list[Tensor]]:
        """Sums of |w|·‖x‖ for every layer."""
        pairs = [wanda_importance(layer, self.norms.of(layer.index)) for layer in self.layers]
        return [groups for groups, _ in pairs], [channels for _, channels in pairs]

    def weight_scores(self, layer: LayerAnatomy, role: str) -> Tensor:
        """|W_ij| · ‖X_j‖₂, compared within each output row."""
        return weight_scores(layer.linears[role].weight, self.norms.of(layer.index)[INPUT_OF[role]])
