"""REAP (Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", arXiv 2510.13999).

S_e = mean over the expert's tokens of g·‖f_e(x)‖₂, with the router's weight g as the model uses it: renormalised over
the chosen experts where the model does so.
"""

from dataclasses import replace
from typing import Any, Literal

from lightning_prune.calibration.hooks import Hooks
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import ForwardPass, Holding, Load, Pass
from lightning_prune.calibration.statistics.routed import RoutedOutputs
from lightning_prune.methods.group_pruning import GroupPruning
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import Block

Criterion = Literal["reap", "frequency", "ean"]


class ExpertActivityPass(ForwardPass):
    """Measures how much every expert outputs; layers without experts are only passed through."""

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
        scores = {
            "reap": self.sums.gated / self.sums.counts.clamp_min(1),
            "frequency": self.sums.counts,
            "ean": self.sums.norms,
        }
        importance = {Block.EXPERT: scores[self.criterion][: self.sums.experts[0].count]}
        return LayerResult(importance, facts=self.sums.facts())

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        base = super().holds(view, load)
        return replace(base, running=base.running + RoutedOutputs.bytes_of(view.experts))


class REAP(GroupPruning):
    """REAP: removes the experts whose gated output is smallest on the tokens routed to them.

    Args:
        pretrained: Model folder or hub id to prune, a mixture of experts.
        criterion: ``reap``, or what the paper compares it with: ``frequency`` (tokens routed to the expert), ``ean``
            (sum of the norms of its outputs).
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
