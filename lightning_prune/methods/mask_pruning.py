"""Zeroing single weights beside removing groups: unstructured and n:m, as in the Wanda paper.

The weights stay in the matrices as zeros, so the checkpoint is a stock one of the dense size. It exists to check our
scores against published numbers, not to make a model smaller.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_prune.calibration.passes import WEIGHT, Finding, Holding, Load
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.methods.group_pruning import GroupPruning
from lightning_prune.methods.masks import Structure, keep_n_of_m_mask, parse_structure, row_mask, tensor_mask
from lightning_prune.methods.scores import group_scores
from lightning_prune.models.families import LayerAnatomy
from lightning_prune.support.errors import UserError


@dataclass(frozen=True)
class MaskRule:
    """What is zeroed in one projection: ``structure`` with ``ratio`` of the weights, compared over each whole matrix
    (``per_tensor``) or each output row. ``frozen``: layers that stay as they are."""

    structure: Structure
    ratio: float
    per_tensor: bool
    frozen: frozenset[int]

    def mask(self, scores: Tensor) -> Tensor:
        """bool ``[out, in]``, True = zeroed, from the scores of one projection."""
        if self.structure.kind == "n:m":
            return keep_n_of_m_mask(scores, self.structure.n, self.structure.m)
        return (tensor_mask if self.per_tensor else row_mask)(scores, self.ratio)


def mask_layer(view: LayerAnatomy, rule: MaskRule, weight_score: Callable[[str], Tensor]) -> Finding:
    """Zero the lowest-scored weights of the seven projections.

    Returns:
        ``weight.<role>``: the new weights; ``attention`` and ``mlp``: fp64 scalars, the scores' sums; ``zeroed``: int64
        scalar.
    """
    sums = {"attention": torch.zeros((), dtype=torch.float64), "mlp": torch.zeros((), dtype=torch.float64)}
    zeroed = torch.zeros((), dtype=torch.int64)
    found: Finding = {}
    if view.index not in rule.frozen:
        for role, linear in view.linears.items():
            scores = weight_score(role)
            if not bool(torch.isfinite(scores).all()):
                raise FloatingPointError(f"layer {view.index}, {role} projection: scores are NaN or infinite.")
            sums["mlp" if role in ("gate", "up", "down") else "attention"] += scores.double().sum().cpu()
            mask = rule.mask(scores)
            found[WEIGHT + role] = linear.weight.masked_fill(mask, 0)
            zeroed += mask.sum().cpu()
    return {**found, **sums, "zeroed": zeroed}


def mask_holding(base: Holding, load: Load) -> Holding:
    """Also the ranking of one weight: scores, their order and both sorted; and every weight anew."""
    return replace(base, finishing=24 * load.largest_weight, new_weights=load.layer_weights)


class GroupOrMaskPruning(GroupPruning):
    """Group pruning that can zero single weights instead.

    Args:
        pretrained: Model folder or hub id to prune. ``demo`` is the small model inside the package.
        pruning_ratio: Share of all parameters (embeddings and head included) to remove, between 0 and 1. For structure
            ``unstructured`` the share of the projections' weights to zero; n:m patterns fix it themselves.
        structure: ``group`` removes GQA groups and MLP channels; ``unstructured`` zeroes single weights; ``2:4`` or
            ``4:8`` keeps n of every m inputs of a row. Zeroed weights change neither memory nor speed.
        group_options: Options of group pruning.
    """

    masks_per_tensor = False  # whether unstructured scores compare over the whole matrix instead of each row

    def __init__(
        self,
        pretrained: str = "demo",
        pruning_ratio: float = 0.2,
        structure: str = "group",
        **group_options: Any,
    ) -> None:
        super().__init__(pretrained, pruning_ratio, **group_options)
        self.structure = parse_structure(structure)
        self.structure_name = structure
        self.reusable = self.reusable and not self.masked
        if self.structure.kind == "n:m":
            self.pruning_ratio = 1 - self.structure.n / self.structure.m
        if self.masked and (
            self.allocation != "global" or self.round_to != 1 or self.min_groups_per_layer or self.steps != 1
        ):
            raise UserError(
                f"--model.structure {structure} zeroes single weights; --model.allocation, --model.round_to, "
                "--model.min_groups_per_layer and --model.steps belong to --model.structure group."
            )
        if self.masked and self.refit != "none":
            raise UserError(
                f"--model.refit {self.refit} fits the columns that stay; --model.structure {structure} leaves none out "
                "whole. Use --model.structure group, or --model.refit none."
            )
        self.zeroed = 0

    @property
    def masked(self) -> bool:
        """Whether single weights are zeroed."""
        return self.structure.kind != "group"

    @property
    def rule(self) -> MaskRule:
        """What a mask pass zeroes."""
        frozen = frozenset(self.frozen_layers(len(self.layers)))
        return MaskRule(self.structure, self.pruning_ratio, self.masks_per_tensor, frozen)

    def decide(self) -> None:
        """Groups: rank and select. Masks: zero what is left to zero; every unit stays."""
        if not self.masked:
            super().decide()
            return
        found = self.found("masks")
        self.zeroed = int(sum(finding["zeroed"] for finding in found))
        # A row per unit, each with an equal share of its block's score: no unit was ranked.
        self.scores = group_scores(
            self.layers,
            [
                (one["attention"] / view.num_kv_heads).expand(view.num_kv_heads)
                for one, view in zip(found, self.layers, strict=True)
            ],
            [
                (one["mlp"] / view.num_channels).expand(view.num_channels)
                for one, view in zip(found, self.layers, strict=True)
            ],
        )
        kept = [
            LayerPlan(view.index, list(range(view.num_kv_heads)), list(range(view.num_channels)))
            for view in self.layers
        ]
        weights = sum(linear.weight.numel() for view in self.layers for linear in view.linears.values())
        plan = self.make_plan(kept, self.dense_parameters, weights_updated=True)
        self.plan = replace(plan, achieved_ratio=self.zeroed / weights)

    def check_ratio(self, layers: list[LayerAnatomy], total_parameters: int) -> None:
        """Masks need widths that their pattern divides."""
        if not self.masked:
            super().check_ratio(layers, total_parameters)
        elif self.structure.kind == "n:m":
            for columns in {linear.in_features for linear in layers[0].linears.values()}:
                keep_n_of_m_mask(torch.zeros(1, columns), self.structure.n, self.structure.m)

    @property
    def note(self) -> str:
        """Zeros save nothing by themselves, and table and card say so."""
        if not self.masked:
            return ""
        return (
            f"{self.zeroed:,} weights ({self.structure_name}) are zero but still stored: memory and speed do not "
            "change. The ratio is a share of the projections' weights."
        )

    def details(self) -> dict[str, Any]:
        """How many weights were zeroed."""
        if not self.masked:
            return {"structure": self.structure_name, **super().details()}
        return {
            "structure": self.structure_name,
            "zeroed_weights": self.zeroed,
            "note": self.note,
            **super().details(),
        }
