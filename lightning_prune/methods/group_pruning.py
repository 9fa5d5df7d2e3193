"""Methods that rank GQA groups and MLP channels: importance → score → one ranking → plan."""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_prune.calibration.passes import Pass
from lightning_prune.checkpoint.cut import parameters_after
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.checkpoint.scores import Flags, Scores
from lightning_prune.methods.base import CALIBRATING
from lightning_prune.methods.refit import RefittingMethod
from lightning_prune.methods.scores import group_scores, groups_that_stay
from lightning_prune.methods.selection import Budget, protect_best, select_global, select_uniform
from lightning_prune.models.families import LayerAnatomy
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError

Allocation = Literal["global", "uniform"]


class GroupPruning(RefittingMethod):
    """Removes GQA groups and MLP channels with the lowest score = importance / cost in parameters.

    Args:
        pretrained: Model folder or hub id to prune. ``demo`` is the small model inside the package.
        pruning_ratio: Share of all parameters (embeddings and head included) to remove, between 0 and 1.
        allocation: ``global`` ranks the groups of all layers together; ``uniform`` takes the same share from every
            layer, so the checkpoint has one width and loads as a stock model.
        round_to: Keep a multiple of this many MLP channels in every layer (64 suits GPU kernels).
        freeze_first_n_layers: Leave this many layers at the input side untouched.
        freeze_last_n_layers: Leave this many layers at the output side untouched.
        min_groups_per_layer: Keep at least this many GQA groups and MLP channels in every layer. 0 lets whole
            blocks and layers go.
        steps: Prune in this many equal shares; importance and priors are measured again on what is left, refitted if
            ``refit`` says so. What is pruned at every step stands in the run folder as ``steps/<ratio>``.
        run_options: Options of every method.
    """

    decision_options = (
        *RefittingMethod.decision_options,
        "allocation",
        "round_to",
        "freeze_first_n_layers",
        "freeze_last_n_layers",
        "min_groups_per_layer",
    )

    def __init__(
        self,
        pretrained: str = "demo",
        pruning_ratio: float = 0.2,
        allocation: Allocation = "global",
        round_to: int = 1,
        freeze_first_n_layers: int = 0,
        freeze_last_n_layers: int = 0,
        min_groups_per_layer: int = 0,
        steps: int = 1,
        **run_options: Any,
    ) -> None:
        super().__init__(pretrained, pruning_ratio, **run_options)
        for name, value, smallest in (
            ("round_to", round_to, 1),
            ("freeze_first_n_layers", freeze_first_n_layers, 0),
            ("freeze_last_n_layers", freeze_last_n_layers, 0),
            ("min_groups_per_layer", min_groups_per_layer, 0),
            ("steps", steps, 1),
        ):
            if value < smallest:
                raise UserError(f"--model.{name}: found {value}; it must be {smallest} or more.")
        self.allocation = allocation
        self.round_to = round_to
        self.freeze_first_n_layers = freeze_first_n_layers
        self.freeze_last_n_layers = freeze_last_n_layers
        self.min_groups_per_layer = min_groups_per_layer
        self.steps = steps
        self.reusable = steps == 1
        self._step = steps

    @property
    def uneven(self) -> bool:
        """Unless every layer loses the same share."""
        return self.allocation == "global"

    @property
    def requested_ratio(self) -> float | None:
        """Of the step that is being made; at last the whole."""
        return float(Fraction(str(self.pruning_ratio)) * self._step / self.steps)

    def stages(self) -> Iterator[tuple[str, list[Pass]]]:
        """Measure, decide and refit once per step, on what the steps before it left."""
        if self.steps == 1:
            yield from super().stages()
            return
        for step in range(1, self.steps + 1):
            self._step = step
            yield CALIBRATING, self._passes if step == 1 else self.passes()
            yield from self.decide_and_refit()
            if step < self.steps:
                self.write_step()
                self.model.change_layers(self.overlay())

    def importances(self) -> tuple[list[Tensor], list[Tensor]]:
        """Importance per GQA group (L tensors ``[K]``) and per MLP channel (L tensors ``[F]``), fp32 or fp64: what the
        pass called ``importance`` left of every layer as ``attention`` and ``mlp``."""
        found = self.found("importance")
        return [finding["attention"] for finding in found], [finding["mlp"] for finding in found]

    def score(self, scores: Scores) -> Scores:
        """Turn importance per cost into the final score; plain methods leave it as it is."""
        return replace(scores, score=scores.base)

    def decide(self) -> None:
        """Rank all groups and take the lowest until the ratio is met."""
        if self.saved is None:
            attention, mlp = self.importances()
            measured = group_scores(self.layers, attention, mlp)
        else:
            measured = self.saved.scores
        scores = self.score(measured)
        ranked = scores
        if self.steps > 1 and self._step > 1:
            scores = _with_gone(scores, self.scores)
            ranked = replace(scores, score=np.where(scores.pruned, -np.inf, scores.score))
        self.scores = replace(scores, pruned=self.select(ranked, self.layers, self.dense_parameters))
        kept = kept_units(self.scores, len(self.layers))
        self.plan = self.make_plan(kept, parameters_after(self.layers, self.dense_parameters, kept))

    def budget(self, layers: list[LayerAnatomy], total_parameters: int) -> Budget:
        """What may go."""
        overhead = {}
        for view in layers:
            overhead[view.index, Block.ATTENTION] = (
                view.attention_block_cost - view.num_kv_heads * view.attention_unit_cost
            )
            overhead[view.index, Block.MLP] = view.mlp_block_cost - view.num_channels * view.mlp_unit_cost
        return Budget(total_parameters, self.requested_ratio or 0.0, overhead, self.round_to)

    def select(self, scores: Scores, layers: list[LayerAnatomy], total_parameters: int) -> Flags:
        """Which units go, bool ``[U]``."""
        budget = self.budget(layers, total_parameters)
        frozen = self.frozen_layers(len(layers))
        free = ~np.isin(scores.layer, list(frozen))
        if not free.any():
            raise UserError(
                f"--model.freeze_first_n_layers {self.freeze_first_n_layers} and --model.freeze_last_n_layers "
                f"{self.freeze_last_n_layers} leave none of the {len(layers)} layers to prune."
            )
        free &= protect_best(scores, self.min_groups_per_layer)
        if layers[0].whole_attention is not None:
            free &= ~scores.of_kind(Block.ATTENTION)
        choose = select_global if self.allocation == "global" else select_uniform
        try:
            return choose(scores, free, budget)
        except UserError as error:
            raise UserError(f"{error}{groups_that_stay(layers)}") from None

    def frozen_layers(self, num_layers: int) -> set[int]:
        """Layers that are never candidates; they are still measured and counted."""
        last = num_layers - self.freeze_last_n_layers
        return {layer for layer in range(num_layers) if not self.freeze_first_n_layers <= layer < last}

    def details(self) -> dict[str, Any]:
        """The options that shaped the selection."""
        return {
            "allocation": self.allocation,
            "round_to": self.round_to,
            "freeze_first_n_layers": self.freeze_first_n_layers,
            "freeze_last_n_layers": self.freeze_last_n_layers,
            "min_groups_per_layer": self.min_groups_per_layer,
            "steps": self.steps,
            **super().details(),
        }

    def check_ratio(self, layers: list[LayerAnatomy], total_parameters: int) -> None:
        """Reachability depends on shapes alone, so constant importances tell."""
        attention = [torch.ones(view.num_kv_heads) for view in layers]
        mlp = [torch.ones(view.num_channels) for view in layers]
        self.select(group_scores(layers, attention, mlp), layers, total_parameters)


def _with_gone(scores: Scores, before: Scores) -> Scores:
    """Units that went in an earlier step keep what was measured then: without them there is nothing to measure."""
    gone = before.pruned
    return replace(
        scores,
        pruned=gone,
        **{
            name: np.where(gone, getattr(before, name), getattr(scores, name))
            for name in ("importance", "prior", "score", "base")
        },
    )


def kept_units(scores: Scores, num_layers: int) -> list[LayerPlan]:
    """What every layer keeps, from the ``pruned`` column."""
    units = {key: scores.unit[rows[scores.kept[rows]]].tolist() for key, rows in scores.blocks.rows().items()}
    return [LayerPlan(layer, units[layer, Block.ATTENTION], units[layer, Block.MLP]) for layer in range(num_layers)]
