"""ShortGPT (Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect")."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from lightning_prune.calibration.hooks import Hooks
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import ForwardPass, Pass
from lightning_prune.calibration.statistics.block_influence import BlockInfluence
from lightning_prune.checkpoint.cut import unpruned
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.methods.base import PruningMethod
from lightning_prune.methods.scores import layer_scores
from lightning_prune.methods.selection import TooLittle
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError


def nearest_layer_count(cost: Sequence[int], budget: float | Fraction, at_most: bool = False) -> int:
    """The number of layers that comes nearest to a budget in parameters, or does not exceed it; of two equally near the
    smaller one. ``cost``: parameters per layer, in the order in which they are removed."""
    spent = [0, *accumulate(cost)]
    if at_most:
        return max(count for count in range(len(spent)) if spent[count] <= budget)
    return min(range(len(spent)), key=lambda count: (abs(spent[count] - budget), count))


class BlockInfluencePass(ForwardPass):
    """BI_l = 1 − E_t[cos(h_l,t, h_{l+1},t)] (eq. 1), with h_l the residual stream that enters layer l."""

    name = "influence"

    def observe(self, view: LayerStructure, hooks: Hooks) -> None:
        self.influence = BlockInfluence().to(self.model.device)
        hooks.on_input_and_output(f"layer {view.index}", view.layer, self.influence.update)

    def conclude(self, view: LayerStructure) -> LayerResult:
        self.influence.raise_if_not_finite(f"layer {view.index}")
        return LayerResult({Block.LAYER: self.influence.reduced().reshape(1)})


class ShortGPT(PruningMethod):
    """ShortGPT: removes whole decoder layers that turn the residual stream least (block influence).

    Args:
        pretrained: Model folder or hub id to prune. ``demo`` is the small model inside the package.
        pruning_ratio: Share of all parameters (embeddings and head included) to remove, between 0 and 1; the number
            of layers nearest to it is removed, so the ratio reached may lie above or below it.
        n_remove_layers: Remove exactly this many layers; ``pruning_ratio`` is then not read.
        at_most: Remove the largest number of layers that does not exceed ``pruning_ratio``, not the nearest.
    """

    experts = True
    uneven = False
    whole_layers = True
    decision_options = (*PruningMethod.decision_options, "n_remove_layers", "at_most")

    def __init__(
        self,
        pretrained: str = "demo",
        pruning_ratio: float = 0.2,
        n_remove_layers: int | None = None,
        at_most: bool = False,
        **run_options: Any,
    ) -> None:
        super().__init__(pretrained, pruning_ratio, **run_options)
        if n_remove_layers is not None and n_remove_layers < 1:
            raise UserError(f"--model.n_remove_layers: found {n_remove_layers}; it must be 1 or more.")
        if n_remove_layers is not None and at_most:
            raise UserError(
                "--model.at_most rounds --model.pruning_ratio, which --model.n_remove_layers replaces. Leave one out."
            )
        if n_remove_layers is not None and self.target is not None:
            raise UserError(f"--model.n_remove_layers and {self.target.option}: give one of them.")
        self.n_remove_layers = n_remove_layers
        self.at_most = at_most

    @property
    def requested_ratio(self) -> float | None:
        return super().requested_ratio if self.n_remove_layers is None else None

    def layer_count(self, layers: Sequence[LayerStructure], total_parameters: int) -> int:
        """The number of ``layers`` to remove, counted from the first. Raises UserError for none and for all."""
        cost, most = [view.cost for view in layers], len(layers) - 1
        budget = self.ratio * total_parameters
        count = self.n_remove_layers or nearest_layer_count(cost, budget, self.at_most)
        if 0 < count <= most:
            return count
        if self.n_remove_layers is not None:
            raise UserError(
                f"--model.n_remove_layers: found {count}; the model has {len(layers)} layers and one must be "
                f"kept, so at most {most} can be removed."
            )
        smallest, largest = cost[0] / total_parameters, sum(cost[:most]) / total_parameters
        error = TooLittle if count < 1 else UserError
        raise error(
            f"--model.pruning_ratio: {float(self.ratio):g} {'allows' if self.at_most else 'is nearest to'} removing "
            f"{count} of {len(layers)} layers. Removing 1 to {most} layers gives ratios from "
            f"{smallest:.4f} to {largest:.4f}, the largest reachable ratio."
        )

    def check_ratio(self, layers: list[LayerStructure], total_parameters: int) -> None:
        # Which are removed first is not known yet: if layers differ in size, the smallest.
        order = sorted(range(len(layers)), key=lambda layer: layers[layer].cost)
        self.choose(order, layers, total_parameters)

    def choose(self, order: list[int], layers: list[LayerStructure], total_parameters: int) -> list[int]:
        """Choose the layers to remove for the ratio or the target, from ``order``, in which they are removed."""

        def removed() -> list[int]:
            return order[: self.layer_count([layers[layer] for layer in order], total_parameters)]

        self.meet_target(lambda: without(layers, removed()), layers, total_parameters)
        return removed()

    def passes(self) -> list[Pass]:
        return [BlockInfluencePass()]

    def decide(self) -> None:
        if self.saved is None:
            influence = torch.cat([result.importance[Block.LAYER] for result in self.results("influence")])
        else:
            influence = torch.from_numpy(self.saved.scores.importance)
        order = influence.argsort(stable=True).tolist()  # of equal ones the lower layer
        # Of a hybrid one layer with attention is kept: transformers cannot decode with a cache of mixers alone.
        attention = [layer for layer in order if Block.ATTENTION in self.layers[layer].parts]
        if 0 < len(attention) < len(order):
            order.append(order.pop(order.index(attention[-1])))
        removed = self.choose(order, self.layers, self.dense_parameters)
        scores = layer_scores(influence, [view.cost for view in self.layers])
        self.scores = replace(scores, pruned=np.isin(scores.layer, removed))
        self.plan = self.make_plan(without(self.layers, removed))

    def details(self) -> dict[str, Any]:
        options = {"n_remove_layers": self.n_remove_layers, "at_most": self.at_most}
        return {"removed_layers": self.plan.removed_layers, **options, **super().details()}


def without(layers: list[LayerStructure], removed: Sequence[int]) -> list[LayerPlan]:
    """A plan that removes whole layers."""
    kept = unpruned(layers)
    none = {layer: LayerPlan(layer, {block: [] for block in kept[layer].kept}) for layer in removed}
    return [none.get(plan.layer, plan) for plan in kept]
