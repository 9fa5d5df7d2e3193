"""Methods that rank GQA groups and MLP channels: importance → score → one ranking → plan."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.checkpoint.cut import parameters_after
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.checkpoint.scores import Flags, Scores
from lightning_prune.methods.base import PruningMethod
from lightning_prune.methods.group_selection import Allocation, GroupSelection
from lightning_prune.methods.scores import group_scores
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError


class GroupPruning(PruningMethod):
    """Removes GQA groups and MLP channels with the lowest score = importance / cost in parameters.

    Args:
        pretrained: Model folder or hub id to prune. ``demo`` is the small model inside the package.
        pruning_ratio: Share of all parameters (embeddings and head included) to remove, between 0 and 1.
        allocation: ``global`` ranks the groups of all layers together; ``uniform`` takes the same share from every
            layer, so the checkpoint has one width and loads as a stock model.
        round_to: Keep a multiple of this many MLP channels in every layer (64 suits GPU kernels).
        freeze_first_n_layers: Leave this many layers at the input side untouched.
        freeze_last_n_layers: Leave this many layers at the output side untouched.
        min_groups_per_layer: Keep at least this many GQA groups and MLP channels in every layer. 0 allows whole
            blocks and layers to be removed.
        steps: Prune in this many equal shares; importance and priors are measured again on what is left, refitted if
            ``refit`` says so. The result of every step is in the run folder as ``steps/<ratio>``.
        run_options: Options of every method.
    """

    decision_options = (
        *PruningMethod.decision_options,
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
        if steps < 1:
            raise UserError(f"--model.steps: found {steps}; it must be 1 or more.")
        self.selection = GroupSelection(
            allocation, round_to, freeze_first_n_layers, freeze_last_n_layers, min_groups_per_layer
        )
        self.steps = self._step = steps
        self.reusable = steps == 1

    @property
    def uneven(self) -> bool:
        return self.selection.allocation == "global"

    @property
    def requested_ratio(self) -> float | None:
        """Of the step that is being made; at last the whole."""
        return float(Fraction(str(self.pruning_ratio)) * self._step / self.steps)

    def begin_step(self, step: int) -> None:
        """The ratio of this step is its share of the whole."""
        self._step = step

    def importances(self) -> dict[Block, list[Tensor]]:
        """Importance per GQA group (L tensors ``[K]``) and per MLP channel (L tensors ``[F]``), fp32 or fp64: the
        results of the pass called ``importance``."""
        results = self.results("importance")
        return {block: [result.importance[block] for result in results] for block in (Block.ATTENTION, Block.MLP)}

    def score(self, scores: Scores) -> Scores:
        """Turn importance per cost into the final score; plain methods leave it as it is."""
        return replace(scores, score=scores.base)

    def decide(self) -> None:
        """Rank all groups and take the lowest until the ratio is met."""
        if self.saved is None:
            importance = self.importances()
            measured = group_scores(self.layers, importance[Block.ATTENTION], importance[Block.MLP])
        else:
            measured = self.saved.scores
        scores = ranked = self.score(measured)
        if self._step > 1 and self.steps > 1:
            scores = _with_earlier_steps(scores, self.scores)
            ranked = replace(scores, score=np.where(scores.pruned, -np.inf, scores.score))
        self.scores = replace(scores, pruned=self.select(ranked, self.layers, self.dense_parameters))
        kept = kept_units(self.scores, len(self.layers))
        self.plan = self.make_plan(kept, parameters_after(self.layers, self.dense_parameters, kept))

    def select(self, scores: Scores, layers: list[LayerStructure], total_parameters: int) -> Flags:
        """Which units are pruned, bool ``[U]``."""
        return self.selection.select(scores, layers, total_parameters, self.requested_ratio or 0.0)

    def details(self) -> dict[str, Any]:
        return {**self.selection.facts(), "steps": self.steps, **super().details()}

    def check_ratio(self, layers: list[LayerStructure], total_parameters: int) -> None:
        attention = [torch.ones(view.num_kv_heads) for view in layers]
        mlp = [torch.ones(view.num_channels) for view in layers]
        self.select(group_scores(layers, attention, mlp), layers, total_parameters)


def _with_earlier_steps(scores: Scores, before: Scores) -> Scores:
    """Units pruned in earlier steps keep their old scores."""
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
    units = {block: scores.unit[rows[scores.kept[rows]]].tolist() for block, rows in scores.blocks.rows().items()}
    blocks = (Block.ATTENTION, Block.MLP)
    return [LayerPlan(layer, *(units.get((layer, block), []) for block in blocks)) for layer in range(num_layers)]
