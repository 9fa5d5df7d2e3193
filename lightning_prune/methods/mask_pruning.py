"""Zeroing single weights beside removing groups: unstructured and n:m, as in the Wanda paper. It checks our scores
against published numbers; the zeros stay in a checkpoint of the dense size."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Holding, Load
from lightning_prune.checkpoint.cut import unpruned
from lightning_prune.methods.group_pruning import GroupPruning
from lightning_prune.methods.scores import group_scores
from lightning_prune.methods.selection import GroupSelection
from lightning_prune.models.families import LayerStructure
from lightning_prune.support.devices import widened
from lightning_prune.support.errors import UserError

Pattern = tuple[int, int]  # n kept of every m inputs of a row


def parse_structure(text: str) -> Pattern | None:
    """(n, m) of ``n:m`` such as 2:4; None of ``group`` and ``unstructured``; UserError of anything else."""
    if text in ("group", "unstructured"):
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match and 0 < int(match[1]) < int(match[2]):
        return int(match[1]), int(match[2])
    raise UserError(
        f"--model.structure: '{text}' is not known. Allowed: group, unstructured, or n:m with 0 < n < m (keep n of "
        "every m inputs), for example 2:4 or 4:8."
    )


@dataclass(frozen=True)
class MaskRule:
    """The weights zeroed in one projection: all but the ``pattern``, or exactly ⌊size · ratio⌋ of each whole matrix
    (``per_tensor``, magnitude's comparison set, whose released baseline prunes one more) or of each output row
    (Wanda's). ``frozen``: layers that are not touched."""

    pattern: Pattern | None
    ratio: float
    per_tensor: bool = False
    frozen: frozenset[int] = frozenset()

    def mask(self, scores: Tensor) -> Tensor:
        """bool ``[out, in]``, True = zeroed, from finite scores of one projection; of equal ones the lower index."""
        if self.pattern is not None:
            n, m = self.pattern
            rows, zeroed = scores.reshape(len(scores), -1, m), m - n
        else:
            rows = scores.reshape(1, -1) if self.per_tensor else scores
            # Of the decimal that was written: 0.29 of 100 is 29, though floats say 28.999…
            zeroed = math.floor(rows.shape[-1] * Fraction(str(self.ratio)))
        lowest = rows.argsort(dim=-1, stable=True)[..., :zeroed]
        return torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, lowest, True).reshape(scores.shape)

    def check_width(self, columns: int) -> None:
        """Raise UserError where the pattern does not divide the inputs of a projection."""
        if self.pattern is not None and columns % self.pattern[1]:
            n, m = self.pattern
            raise UserError(
                f"--model.structure {n}:{m} needs input widths divisible by {m}, found a linear with {columns} inputs. "
                "Use another n:m or --model.structure unstructured."
            )

    def holding(self, base: Holding, load: Load) -> Holding:
        """``base`` with the ranking of one weight (scores, their order, both sorted), and all weights anew."""
        return replace(base, finishing=24 * load.largest_weight, new_weights=load.layer_weights)


def mask_layer(view: LayerStructure, rule: MaskRule, weight_score: Callable[[str], Tensor]) -> LayerResult:
    """Zero the lowest-scored weights of all projections. The importance of a block is the sum of its scores ``[1]``,
    fp64; the fact ``zeroed`` is how many weights are zero now. Raises FloatingPointError: a score is not finite."""
    sums = {block: torch.zeros(1, dtype=torch.float64) for block in view.prunable}
    zeroed, weights = 0, {}
    for block in view.prunable if view.index not in rule.frozen else ():
        for role in view.parts[block].linears if view.units(block) else ():
            scores = weight_score(role)
            if not bool(torch.isfinite(scores).all()):
                raise FloatingPointError(f"layer {view.index}, {role} projection: scores are NaN or infinite.")
            sums[block] += widened(scores).sum().cpu()
            mask = rule.mask(scores)
            weights[role] = view.linears[role].weight.masked_fill(mask, 0)
            zeroed += int(mask.sum())
    return LayerResult(sums, weights, facts={"zeroed": zeroed})


class GroupOrMaskPruning(GroupPruning):
    """Group pruning that can zero single weights instead.

    Args:
        pretrained: Model folder or hub id to prune. ``demo`` is the small model inside the package.
        pruning_ratio: Share of all parameters (embeddings and head included) to remove, between 0 and 1. For structure
            ``unstructured`` the share of the projections' weights to zero; n:m patterns fix it themselves.
        structure: ``group`` removes GQA groups and MLP channels; ``unstructured`` zeroes single weights; ``2:4`` or
            ``4:8`` keeps n of every m inputs of a row. Zeroed weights change neither memory nor speed.
    """

    masks_per_tensor = False  # whether unstructured scores compare over the whole matrix instead of each row

    def __init__(
        self, pretrained: str = "demo", pruning_ratio: float = 0.2, structure: str = "group", **group_options: Any
    ) -> None:
        super().__init__(pretrained, pruning_ratio, **group_options)
        self.structure = structure
        self.pattern = parse_structure(structure)
        self.zeroed = 0
        if structure == "group":
            return
        self.reusable = False
        if self.pattern is not None:
            self.pruning_ratio = 1 - self.pattern[0] / self.pattern[1]
        unfrozen = replace(self.selection, freeze_first_n_layers=0, freeze_last_n_layers=0)
        if unfrozen != GroupSelection() or self.steps != 1:
            raise UserError(
                f"--model.structure {structure} zeroes single weights; --model.allocation, --model.round_to, "
                "--model.groups_multiple_of, --model.min_groups_per_layer and --model.steps belong to --model."
                "structure group."
            )
        if self.target is not None:
            raise UserError(
                f"{self.target.option}: --model.structure {structure} zeroes single weights, which stay in the files. "
                "Use --model.structure group, or --model.pruning_ratio."
            )
        if self.refit is not None:
            raise UserError(
                f"--model.refit {self.refit.target} fits the columns that are kept; --model.structure {structure} "
                "removes none whole. Use --model.structure group, or --model.refit none."
            )

    @property
    def mask_rule(self) -> MaskRule | None:
        """The rule by which the pass zeroes weights; None where groups are removed."""
        if self.structure == "group":
            return None
        frozen = frozenset(self.selection.frozen_layers(len(self.layers)))
        return MaskRule(self.pattern, self.pruning_ratio, self.masks_per_tensor, frozen)

    def decide(self) -> None:
        """Groups: rank and select. Masks: the weights are zeroed already, and every unit is kept."""
        if self.structure == "group":
            super().decide()
            return
        results = self.results("masks")
        self.zeroed = sum(result.facts["zeroed"] for result in results)
        # A row per unit with an equal share of its block's score, since no unit was ranked.
        shares = [
            {block: (total / view.units(block)).expand(view.units(block)) for block, total in result.importance.items()}
            for result, view in zip(results, self.layers, strict=True)
        ]
        self.scores = group_scores(self.layers, shares)
        weights = sum(linear.weight.numel() for view in self.layers for linear in view.linears.values())
        plan = self.make_plan(unpruned(self.layers), weights_updated=True)
        self.plan = replace(plan, achieved_ratio=self.zeroed / weights)

    def check_ratio(self, layers: list[LayerStructure], total_parameters: int) -> None:
        if (rule := self.mask_rule) is None:
            super().check_ratio(layers, total_parameters)
            return
        if any(view.experts for view in layers):
            raise UserError(
                f"--model.structure {self.structure} zeroes weights of projections, and '{self.pretrained}' is a "
                "mixture of experts. Use --model.structure group."
            )
        for view in layers:
            for linear in view.linears.values():
                rule.check_width(linear.in_features)

    @property
    def note(self) -> str:
        """A sentence for table and card: zeros save nothing by themselves."""
        if self.structure == "group":
            return ""
        return (
            f"{self.zeroed:,} weights ({self.structure}) are zero but still stored: memory and speed do not "
            "change. The ratio is a share of the projections' weights."
        )

    def details(self) -> dict[str, Any]:
        masked = {} if self.structure == "group" else {"zeroed_weights": self.zeroed, "note": self.note}
        return {"structure": self.structure, **masked, **super().details()}
