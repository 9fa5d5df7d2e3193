"""Zeroing single weights beside removing groups: unstructured and n:m, as in the Wanda paper.

The weights stay in the matrices as zeros, so the checkpoint is a stock one of the dense size. It exists to check our
scores against published numbers, not to make a model smaller.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Holding, Load
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.methods.group_pruning import GroupPruning
from lightning_prune.methods.group_selection import GroupSelection
from lightning_prune.methods.masks import Structure, keep_n_of_m_mask, parse_structure, row_mask, tensor_mask
from lightning_prune.methods.scores import group_scores
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import ROLES_OF, Block
from lightning_prune.support.devices import widened
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


def mask_layer(view: LayerStructure, rule: MaskRule, weight_score: Callable[[str], Tensor]) -> LayerResult:
    """Zero the lowest-scored weights of the seven projections.

    Returns:
        The new weights; the sum of the scores as every block's importance ``[1]``, fp64; the fact ``zeroed``, how many
        weights are zero now.
    """
    sums = {block: torch.zeros((), dtype=torch.float64) for block in ROLES_OF}
    zeroed, weights = 0, {}
    if view.index not in rule.frozen:
        for block, roles in ROLES_OF.items():
            for role in roles:
                scores = weight_score(role)
                if not bool(torch.isfinite(scores).all()):
                    raise FloatingPointError(f"layer {view.index}, {role} projection: scores are NaN or infinite.")
                sums[block] += widened(scores).sum().cpu()
                mask = rule.mask(scores)
                weights[role] = view.linears[role].weight.masked_fill(mask, 0)
                zeroed += int(mask.sum())
    return LayerResult({block: total[None] for block, total in sums.items()}, weights, facts={"zeroed": zeroed})


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
        self.structure = structure
        parsed = parse_structure(structure)
        self.masks = None if parsed.kind == "group" else parsed
        self.zeroed = 0
        if self.masks is None:
            return
        self.reusable = False
        if self.masks.kind == "n:m":
            self.pruning_ratio = 1 - self.masks.n / self.masks.m
        unfrozen = replace(self.selection, freeze_first_n_layers=0, freeze_last_n_layers=0)
        if unfrozen != GroupSelection() or self.steps != 1:
            raise UserError(
                f"--model.structure {structure} zeroes single weights; --model.allocation, --model.round_to, "
                "--model.min_groups_per_layer and --model.steps belong to --model.structure group."
            )
        if self.refit is not None:
            raise UserError(
                f"--model.refit {self.refit.target} fits the columns that are kept; --model.structure {structure} "
                "removes none whole. Use --model.structure group, or --model.refit none."
            )

    def mask_rule(self, structure: Structure) -> MaskRule:
        """What a mask pass zeroes."""
        frozen = frozenset(self.selection.frozen_layers(len(self.layers)))
        return MaskRule(structure, self.pruning_ratio, self.masks_per_tensor, frozen)

    def decide(self) -> None:
        """Groups: rank and select. Masks: the weights are zeroed already, and every unit is kept."""
        if self.masks is None:
            super().decide()
            return
        results = self.results("masks")
        self.zeroed = sum(result.facts["zeroed"] for result in results)
        # A row per unit with an equal share of its block's score, since no unit was ranked.
        shares = {
            block: [
                (result.importance[block] / view.units(block)).expand(view.units(block))
                for result, view in zip(results, self.layers, strict=True)
            ]
            for block in ROLES_OF
        }
        self.scores = group_scores(self.layers, shares[Block.ATTENTION], shares[Block.MLP])
        kept = [LayerPlan(v.index, list(range(v.num_kv_heads)), list(range(v.num_channels))) for v in self.layers]
        weights = sum(linear.weight.numel() for view in self.layers for linear in view.linears.values())
        plan = self.make_plan(kept, self.dense_parameters, weights_updated=True)
        self.plan = replace(plan, achieved_ratio=self.zeroed / weights)

    def check_ratio(self, layers: list[LayerStructure], total_parameters: int) -> None:
        if self.masks is None:
            super().check_ratio(layers, total_parameters)
        elif self.masks.kind == "n:m":
            for columns in {linear.in_features for linear in layers[0].linears.values()}:
                keep_n_of_m_mask(torch.zeros(1, columns), self.masks.n, self.masks.m)

    @property
    def note(self) -> str:
        """Zeros save nothing by themselves, and table and card say so."""
        if self.masks is None:
            return ""
        return (
            f"{self.zeroed:,} weights ({self.structure}) are zero but still stored: memory and speed do not "
            "change. The ratio is a share of the projections' weights."
        )

    def details(self) -> dict[str, Any]:
        masked = {} if self.masks is None else {"zeroed_weights": self.zeroed, "note": self.note}
        return {"structure": self.structure, **masked, **super().details()}
