"""FLAP (An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models").

WIFV_j = v_j · Σ_i W_ij², with v_j the variance of a projection's input channel over the calibration tokens, is
standardised within the layer's projection, so that all layers rank together. Variance and metric are as the paper
defines them; the released code's depend on the order of samples, and square attention's metric first.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_prune.calibration.hooks import Hooks
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import ForwardPass, Pass
from lightning_prune.checkpoint.cut import parameters_after
from lightning_prune.checkpoint.family_check import check_family
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.checkpoint.scores import Flags, Scores
from lightning_prune.methods.bias_compensation import BiasPass, MeanBiases, MeansPass, read_moments, watch_moments
from lightning_prune.methods.group_pruning import GroupPruning
from lightning_prune.methods.scores import group_scores
from lightning_prune.models.families import LayerStructure, with_biases
from lightning_prune.models.vocabulary import OUTPUT_ROLE


def in_deviations(metric: Tensor, units: int) -> Tensor:
    """Mean of a metric over each unit's channels, in standard deviations (unbiased) of all channels, ``[units]``; 0
    where all channels agree."""
    if not units:
        return metric
    spread = metric.std()
    return metric.reshape(units, -1).mean(1) / spread if float(spread) > 0 else metric.new_zeros(units)


class FLAPPass(ForwardPass):
    """Importance per unit, from what o_proj and down_proj read."""

    name = "importance"

    def observe(self, view: LayerStructure, hooks: Hooks) -> None:
        self.moments = watch_moments(view, hooks, OUTPUT_ROLE.values())

    def conclude(self, view: LayerStructure) -> LayerResult:
        """Mean WIFV / std per GQA group and per channel; the fact ``means``: x̄ by role."""
        importance, means = {}, {}
        moments = read_moments(view, self.moments)
        for block in view.prunable:
            mean, variance = moments[OUTPUT_ROLE[block]]
            squares = view.projection(block).weight.float().square().sum(0)
            importance[block] = in_deviations(variance * squares, view.units(block))
            means[OUTPUT_ROLE[block]] = mean.tolist()
        return LayerResult(importance, facts={"means": means})


class FLAP(GroupPruning):
    """FLAP: removes the channels and GQA groups that fluctuate least, all layers ranked together by standard scores.

    Args:
        bias_compensation: Let biases of o_proj and down_proj take over the mean of what is removed, where the family's
            config has such biases. With False, or with a refit, FLAP only selects.
    """

    decision_options = (*GroupPruning.decision_options, "bias_compensation")

    def __init__(
        self, pretrained: str = "demo", pruning_ratio: float = 0.2, bias_compensation: bool = True, **options: Any
    ) -> None:
        super().__init__(pretrained, pruning_ratio, **options)
        self.bias_compensation = bias_compensation
        self.means: list[dict[str, list[float]]] = []  # of what the projections read, layer by layer

    @cached_property
    def offered(self) -> MeanBiases:
        """Biases that the model's family can have."""
        return MeanBiases.of(self.checkpoint.config)

    @property
    def biases(self) -> MeanBiases | None:
        """Biases that take over means in this run; None where none does."""
        wanted = self.bias_compensation and self.refit is None
        return self.offered if wanted and self.offered.roles else None

    @property
    def label(self) -> str:
        return self._label or (super().label if self.bias_compensation or self.refit is not None else "flap_selection")

    def passes(self) -> list[Pass]:
        return [FLAPPass()]

    @property
    def needs_calibration(self) -> bool:
        """Means are not part of the scores: they are read off the calibration set again."""
        return super().needs_calibration or self.biases is not None

    def refit_passes(self, kept: list[LayerPlan], held_out: Callable[[], Tensor]) -> list[Pass]:
        if self.biases is None:
            return super().refit_passes(kept, held_out)
        if self.saved is not None or self.steps > 1:  # scores without means, or means of a model that lost something
            return [MeansPass(kept, self.biases.roles)]
        return [BiasPass(kept, self.biases.roles, self.means)]

    def check_model(self) -> None:
        """Check the model as every method does, and that its family with these biases behaves as its record says."""
        super().check_model()
        if self.biases is not None and self.biases.keys:
            check_family(with_biases(self.checkpoint.config, self.biases.keys))

    def score(self, scores: Scores) -> Scores:
        """z itself, not z per parameter: importance less its mean over the units of a block of a layer."""
        z = torch.tensor(scores.importance)
        for rows in scores.blocks.rows().values():
            z[rows] -= z[rows].mean()
        return replace(scores, base=z.numpy(), score=z.numpy())

    def select(self, scores: Scores, layers: list[LayerStructure], total_parameters: int) -> Flags:
        """Select by the cost of units with their biases. The biases add parameters, so as many more are pruned; this
        counts those of other projections, which the same keys switch on as zeros."""
        if self.biases is None:
            return super().select(scores, layers, total_parameters)
        views, added = self.biases.views, self.biases.parameters - total_parameters
        scores = replace(scores, cost=group_scores(views).cost)
        return self.selection.select(scores, views, total_parameters, self.ratio, added)

    def decide(self) -> None:
        super().decide()
        if self.saved is None:
            self.means = [result.facts["means"] for result in self.results("importance")]
        if self.biases is not None:
            self.plan = replace(self.plan, biases=self.biases.keys)

    def parameters_left(self, layers: list[LayerStructure], total: int, kept: list[LayerPlan]) -> int:
        if self.biases is None:
            return super().parameters_left(layers, total, kept)
        return parameters_after(self.biases.views, self.biases.parameters, kept)

    @property
    def note(self) -> str:
        """A sentence for the card and a comparison's audit where a mean is lost."""
        lost = self._why_not() if self.bias_compensation and self.refit is None else None
        return f"FLAP's bias compensation is left out where it cannot be: {lost}." if lost else ""

    def _why_not(self) -> str | None:
        """The reason why no bias takes over a mean that is lost; None where no mean is lost."""
        if self.refit is not None:
            return "what is kept is refitted"
        if not self.bias_compensation:
            return "switched off"
        lost = [f"{'o' if role == 'output' else role}_proj" for role in self.offered.without]
        return f"family '{self.checkpoint.config.model_type}' has no bias for {' and '.join(lost)}" if lost else None

    def details(self) -> dict[str, Any]:
        roles, keys = ([], []) if self.biases is None else (self.biases.roles, self.biases.keys)
        compensation = {"projections": roles, "config_keys": keys, "why_not": self._why_not()}
        return {"bias_compensation": compensation, "note": self.note, **super().details()}
