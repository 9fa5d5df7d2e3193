"""Methods that rank GQA groups and MLP channels: importance → score → one ranking → plan."""

from dataclasses import asdict, fields, replace
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.checkpoint.scores import Flags, Scores
from lightning_prune.methods.base import PruningMethod
from lightning_prune.methods.expert_selection import select_with_experts
from lightning_prune.methods.experts import expert_details, in_units, marked
from lightning_prune.methods.scores import group_scores
from lightning_prune.methods.selection import Allocation, GroupSelection
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import EXPERTS, Block
from lightning_prune.support.errors import UserError

Units = Literal["auto", "expert_channel", "expert", "all"]


class GroupPruning(PruningMethod):
    """Removes GQA groups and MLP channels with the lowest score = importance / cost in parameters.

    Args:
        allocation: ``global`` ranks the groups of all layers together; ``uniform`` takes the same share from every
            layer, so the checkpoint has one width and loads as a stock model.
        round_to: Keep a multiple of this many MLP channels in every layer (64 suits GPU kernels).
        freeze_first_n_layers: Leave this many layers at the input side untouched.
        freeze_last_n_layers: Leave this many layers at the output side untouched.
        min_groups_per_layer: Keep at least this many GQA groups and MLP channels in every layer. 0 allows whole
            blocks and layers to be removed.
        groups_multiple_of: Keep a multiple of this many GQA groups in every layer: the devices of tensor parallelism.
        units: Of a mixture of experts: ``expert_channel`` (the default there) removes channels inside every expert,
            ``expert`` whole experts, equally many of every layer; ``all`` also GQA groups and channels of layers
            without experts. Without experts there is nothing to choose.
        super_experts: Whether experts whose output peaks far above all others may be removed whole: ``keep`` or
            ``remove``.
        steps: Prune in this many equal shares; importance and priors are measured again on what is left, refitted if
            ``refit`` says so. The result of every step is in the run folder as ``steps/<ratio>``.
    """

    decision_options = (*PruningMethod.decision_options, *(option.name for option in fields(GroupSelection)))

    def __init__(
        self,
        pretrained: str = "demo",
        pruning_ratio: float = 0.2,
        allocation: Allocation = "global",
        round_to: int = 1,
        freeze_first_n_layers: int = 0,
        freeze_last_n_layers: int = 0,
        min_groups_per_layer: int = 0,
        groups_multiple_of: int = 1,
        units: Units = "auto",
        super_experts: Literal["keep", "remove"] = "keep",
        steps: int = 1,
        **run_options: Any,
    ) -> None:
        super().__init__(pretrained, pruning_ratio, **run_options)
        if steps < 1:
            raise UserError(f"--model.steps: found {steps}; it must be 1 or more.")
        if steps > 1 and self.target is not None:
            raise UserError(
                f"--model.steps {steps} divides --model.pruning_ratio, which {self.target.option} replaces. Leave "
                "one out."
            )
        self.selection = GroupSelection(
            *(allocation, round_to, freeze_first_n_layers, freeze_last_n_layers),
            *(min_groups_per_layer, groups_multiple_of),
        )
        self.units: Units = units
        self.super_experts = super_experts
        self._experts: dict[str, Any] = {}
        self.uneven = allocation == "global"
        self.steps = self.step = steps
        self.reusable = steps == 1

    def score(self, scores: Scores) -> Scores:
        """Turn importance per cost into the final score; plain methods leave it as it is."""
        return scores

    def measured(self) -> Scores:
        """Scores before any prior, from an earlier run or from the results of the pass ``importance``."""
        if self.saved is not None:
            return replace(self.saved.scores, score=self.saved.scores.base)
        results = self.results("importance")
        samples = len(self.datamodule.calibration.tokens) if self.measures_text else 0
        self._experts = expert_details(self.layers, results, samples, self.units != "expert" or self.refit is not None)
        importance = [in_units(view, result.importance) for view, result in zip(self.layers, results, strict=True)]
        return marked(group_scores(self.layers, importance, self.kinds(self.layers)), self._experts)

    def decide(self) -> None:
        """Rank all groups and take the lowest until the ratio is met."""
        measured = self.measured()
        if self.target is not None:
            measured = self.target.weighed(measured, self.checkpoint.config, self.layers)
        scores = ranked = self.score(measured)
        if self.step > 1:
            gone, before = self.scores.pruned, self.scores
            scores = replace(
                scores,
                **{  # units pruned in earlier steps keep their old scores
                    name: np.where(gone, getattr(before, name), getattr(scores, name))
                    for name in ("importance", "prior", "score", "base")
                },
            )
            ranked = replace(scores, score=np.where(gone, -np.inf, scores.score))
        self.scores = replace(scores, pruned=self.choose(ranked, self.layers, self.dense_parameters))
        self.plan = self.make_plan(kept_units(self.scores, self.layers))
        bare = sum(layer.kept.get(Block.ATTENTION) == [] for layer in self.plan.layers)
        if 2 * bare > len(self.layers):
            rank_zero_warn(
                f"{bare} of {len(self.layers)} layers keep no attention, so the model can hardly read its context. "
                "Remove less, or keep some with --model.min_groups_per_layer 1."
            )
        if said := self.selection.unrounded(self.scores, self.layers):
            rank_zero_warn(said)

    def choose(self, scores: Scores, layers: list[LayerStructure], total_parameters: int) -> Flags:
        """``select`` with the ratio that meets the target, if there is one."""

        def keep() -> list[LayerPlan]:
            return kept_units(replace(scores, pruned=self.select(scores, layers, total_parameters)), layers)

        self.meet_target(keep, layers, total_parameters)
        return self.select(scores, layers, total_parameters)

    def select(self, scores: Scores, layers: list[LayerStructure], total_parameters: int) -> Flags:
        """Select the units to prune, bool ``[U]``."""
        if not any(view.experts for view in layers):
            return self.selection.select(scores, layers, total_parameters, self.ratio)
        budget = self.selection.budget(layers, total_parameters, self.ratio)
        protected = np.zeros(len(scores.layer), dtype=bool)
        if scores.super_expert is not None and self.super_experts == "keep":
            protected = scores.super_expert & scores.of_kind(Block.EXPERT)
        return select_with_experts(self.selection, scores, layers, budget, protected)

    def arranged(self, layers: list[LayerStructure]) -> list[LayerStructure]:
        return [view.with_experts_as(Block.EXPERT) for view in layers] if self.units == "expert" else layers

    def kinds(self, layers: list[LayerStructure]) -> tuple[Block, ...]:
        """The kinds of units that may be removed. Raises UserError where the model does not have those requested."""
        if not any(view.experts for view in layers):
            if self.units in EXPERTS or self.experts == "only":
                only = self.experts == "only"
                how = "" if only else f" with --model.units {self.units}"
                remedy = "Give a mixture of experts, or choose another method." if only else "Leave that option out."
                raise UserError(
                    f"--model: '{self.pretrained}' has no experts, and {self.method}{how} prunes only experts. {remedy}"
                )
            return super().kinds(layers)
        if self.steps > 1:
            raise UserError("--model.steps: experts are pruned in one step. Leave it out.")
        if self.units == "all" and self.experts == "only":
            raise UserError(f"--model.units all: {self.method} prunes experts alone. Use expert or expert_channel.")
        if self.units == "all":
            return (Block.ATTENTION, Block.MLP, Block.EXPERT_CHANNEL)
        return (Block.EXPERT if self.units == "expert" else Block.EXPERT_CHANNEL,)

    def details(self) -> dict[str, Any]:
        details = {**asdict(self.selection), "steps": self.steps, **super().details()}
        if not any(view.experts for view in self.layers):
            return details
        seen = self._experts if self.saved is None else self.saved.details
        facts = {"experts": seen["experts"]} if "experts" in seen else {}
        return {**details, "units": list(self.kinds(self.layers)), **facts}

    def check_ratio(self, layers: list[LayerStructure], total_parameters: int) -> None:
        units, kinds = sum(view.units(block) for view in layers for block in view.scored), self.kinds(layers)
        if self.steps > units:
            raise UserError(
                f"--model.steps: found {self.steps}; the model has {units} units, and every step removes at least one."
            )
        self.choose(group_scores(layers, kinds=kinds), layers, total_parameters)


def kept_units(scores: Scores, layers: list[LayerStructure]) -> list[LayerPlan]:
    """Plans of all layers from their scores: a mixer has no scores and is kept."""
    units = {block: scores.unit[rows[scores.kept[rows]]].tolist() for block, rows in scores.blocks.rows().items()}
    return [
        LayerPlan(i, view.all_units | {block: units[i, block] for block in view.scored if (i, block) in units})
        for i, view in enumerate(layers)
    ]
