"""REAP (Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", arXiv 2510.13999).

The score of an expert is the mean, over the tokens routed to it, of the router's weight times the norm of the expert's
output: S_e = mean of g_e(x)·‖f_e(x)‖₂. Every layer loses the same number of experts, the lowest ones.
"""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from lightning_prune.calibration.hooks import Hooks
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import ForwardPass, Holding, Load, Pass
from lightning_prune.calibration.statistics.routed import RoutedOutputs
from lightning_prune.methods.expert_scores import reap
from lightning_prune.methods.group_pruning import GroupPruning
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import Block

Criterion = Literal["reap", "frequency", "ean"]


class ExpertActivityPass(ForwardPass):
    """How much an expert does, seen from its output; layers without experts are passed."""

    name = "importance"

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion

    def observe(self, view: LayerStructure, hooks: Hooks) -> None:
        self.sums = None if view.experts is None else RoutedOutputs(view.experts).to(self.model.device)
        if self.sums is not None:
            hooks.on_experts(f"layer {view.index}, experts", self.sums.experts[0].module, self.sums.update)

    def conclude(self, view: LayerStructure) -> LayerResult:
        if self.sums is None:
            return LayerResult(facts={"experts": None})
        self.sums.raise_if_not_finite(f"layer {view.index}, experts")
        scores: dict[str, Tensor] = {
            "reap": reap(self.sums),
            "frequency": self.sums.counts,
            "ean": self.sums.norms,
        }
        return LayerResult(
            {Block.EXPERT: scores[self.criterion][: self.sums.experts[0].count]}, facts=self.sums.facts()
        )

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        base = super().holds(view, load)
        return replace(base, running=base.running + RoutedOutputs.bytes_of(view.experts))


class REAP(GroupPruning):
    """REAP: removes the experts whose gated output is smallest on the tokens routed to them.

    Args:
        pretrained: Model folder or hub id to prune, a mixture of experts.
        pruning_ratio: Share of all parameters (embeddings and head included) to remove, between 0 and 1.
        criterion: ``reap``, or what the paper compares it with: ``frequency`` (tokens routed to the expert), ``ean``
            (sum of the norms of its outputs).
        group_options: Options of group pruning.
    """

    experts = "only"

    def __init__(
        self,
        pretrained: str = "demo",
        pruning_ratio: float = 0.2,
        criterion: Criterion = "reap",
        **group_options: Any,
    ) -> None:
        super().__init__(pretrained, pruning_ratio, units="expert", **group_options)
        self.criterion = criterion

    @property
    def method(self) -> str:
        return self.criterion if self.criterion == "reap" else f"expert_{self.criterion}"

    def passes(self) -> list[Pass]:
        return [ExpertActivityPass(self.criterion)]

    def details(self) -> dict[str, Any]:
        return {"criterion": self.criterion, **super().details()}
