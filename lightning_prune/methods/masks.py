"""Scores of single weights → which of them are zeroed: a share of a row or a tensor, or all but n of every m."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Holding, Load
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
    """What is zeroed in one projection: all but the ``pattern``, or exactly ⌊size · ratio⌋ weights of each whole matrix
    (``per_tensor``, magnitude's comparison set, whose released baseline prunes one more) or of each output row
    (Wanda's). ``frozen``: layers that are not touched."""

    pattern: Pattern | None
    ratio: float
    per_tensor: bool = False
    frozen: frozenset[int] = frozenset()

    def mask(self, scores: Tensor) -> Tensor:
        """bool ``[out, in]``, True = zeroed, from the scores of one projection, compared in fp32 or better. Among equal
        scores the lower index is zeroed.

        Raises:
            FloatingPointError: a score is NaN.
        """
        if self.pattern is not None:
            n, m = self.pattern
            rows, zeroed = scores.reshape(len(scores), -1, m), m - n
        else:
            rows = scores.reshape(1, -1) if self.per_tensor else scores
            # Of the decimal that was written: 0.29 of 100 is 29, though floats say 28.999…
            zeroed = math.floor(rows.shape[-1] * Fraction(str(self.ratio)))
        if bool(rows.isnan().any()):
            raise FloatingPointError("a score is NaN.")
        if rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.float()
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
        """Also the ranking of one weight (scores, their order, both sorted), and every weight anew."""
        return replace(base, finishing=24 * load.largest_weight, new_weights=load.layer_weights)


def mask_layer(view: LayerStructure, rule: MaskRule, weight_score: Callable[[str], Tensor]) -> LayerResult:
    """Zero the lowest-scored weights of all projections. The importance of a block is the sum of its scores ``[1]``,
    fp64; the fact ``zeroed`` is how many weights are zero now."""
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
