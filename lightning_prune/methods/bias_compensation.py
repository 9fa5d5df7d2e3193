"""Biases that take over the mean output of removed columns of o_proj and down_proj, where families have them (FLAP)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.calibration.hooks import Hooks
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import ForwardPass, WeightsPass
from lightning_prune.calibration.statistics.channel_sums import InputMoments
from lightning_prune.calibration.statistics.token_statistic import full_precision
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.methods.columns import columns_of
from lightning_prune.models.checkpoint import skeleton
from lightning_prune.models.families import (
    LayerStructure,
    count_parameters,
    family_of,
    layer_structures,
    missing_biases,
    with_biases,
)
from lightning_prune.models.vocabulary import OUTPUT_ROLE, Block
from lightning_prune.support.devices import widest


@dataclass(frozen=True)
class MeanBiases:
    """Biases that can take over a mean in a model.

    Attributes:
        roles: those of output and down that can have one; ``without``: those that cannot, though columns are removed.
        keys: of the config, to switch on for them; none where the model has these biases already.
        views, parameters: of the dense model with the biases that the keys give it.
    """

    roles: list[str]
    without: list[str]
    keys: list[str]
    views: list[LayerStructure]
    parameters: int

    @classmethod
    def of(cls, config: Any) -> "MeanBiases":
        """The biases that the family of ``config`` can have."""
        missing = missing_biases(config)
        family, layers = family_of(config), range(config.num_hidden_layers)
        there = {block for layer in layers for block in family.blocks_of(config, layer)}
        there -= {Block.ATTENTION} if family.whole_attention else set()
        losing = [role for block, role in OUTPUT_ROLE.items() if block in there]
        roles = [role for role in losing if missing.get(role, "") is not None]
        keys = sorted({key for role in roles if (key := missing.get(role)) is not None})
        net = skeleton(with_biases(config, keys))
        without = [role for role in losing if role not in roles]
        return cls(roles, without, keys, layer_structures(net), count_parameters(net))


def new_biases(view: LayerStructure, kept: LayerPlan, means: Mapping[str, Tensor]) -> LayerResult:
    """New biases fp32 ``[D]`` of one layer from mean inputs x̄ ``[n]`` by role; none for a block that is removed.

    With P the removed columns b' = b + W_P·x̄_P, so each projection keeps its mean output on the dense model's inputs.

    Raises:
        FloatingPointError: a bias is not finite, or does not fit into the model's dtype.
    """
    biases = {}
    for block in view.prunable:
        role, linear = OUTPUT_ROLE[block], view.projection(block)
        if role not in means or not kept.kept[block]:
            continue
        removed = means[role].clone()
        units = torch.tensor(kept.kept[block], dtype=torch.int64, device=removed.device)
        removed[columns_of(units, linear.in_features // view.units(block))] = 0
        with full_precision(linear.weight.device):
            bias = torch.mv(linear.weight.float(), removed.float())
        if linear.bias is not None:
            bias += linear.bias.float()
        if not bool(torch.isfinite(bias.to(linear.weight.dtype)).all()):
            raise FloatingPointError(f"layer {view.index}, {role} projection: the new bias is NaN or infinite.")
        biases[role] = bias
    return LayerResult(biases=biases)


class MeansPass(ForwardPass):
    """Measures the mean inputs of the projections with ``roles`` on the dense model, for its new biases."""

    name = "bias"

    def __init__(self, kept: Sequence[LayerPlan], roles: Collection[str]) -> None:
        self.kept, self.roles = kept, roles

    def observe(self, view: LayerStructure, hooks: Hooks) -> None:
        self.moments = watch_moments(view, hooks, self.roles)

    def conclude(self, view: LayerStructure) -> LayerResult:
        means = {role: moments[0] for role, moments in read_moments(view, self.moments).items()}
        return new_biases(view, self.kept[view.index], means)


class BiasPass(WeightsPass):
    """New biases from the ``means`` of every layer by role, which the importance's pass over the dense model had."""

    name = "bias"

    def __init__(self, kept: Sequence[LayerPlan], roles: Collection[str], means: Sequence[dict[str, list[float]]]):
        self.kept, self.roles, self.means = kept, roles, means

    def conclude(self, view: LayerStructure) -> LayerResult:
        device = self.model.device
        means = {
            role: torch.tensor(values, dtype=widest(device), device=device)
            for role, values in self.means[view.index].items()
            if role in self.roles
        }
        with torch.no_grad():
            return new_biases(view, self.kept[view.index], means)


def watch_moments(view: LayerStructure, hooks: Hooks, roles: Collection[str]) -> dict[str, InputMoments]:
    """Mean and variance of what the projections that write to the residual stream read, by role."""
    moments = {}
    for block in view.prunable:
        role, linear = OUTPUT_ROLE[block], view.projection(block)
        if role in roles:
            moments[role] = InputMoments(linear.in_features).to(linear.weight.device)
            hooks.on_input(f"layer {view.index}, input of {role}", linear.module, moments[role].update)
    return moments


def read_moments(view: LayerStructure, moments: dict[str, InputMoments]) -> dict[str, Tensor]:
    """Mean and variance ``[2, n]`` by role, or FloatingPointError that names the projection."""
    for role, statistic in moments.items():
        statistic.raise_if_not_finite(f"layer {view.index}, input of {role}")
    return {role: statistic.reduced().reshape(2, -1) for role, statistic in moments.items()}
