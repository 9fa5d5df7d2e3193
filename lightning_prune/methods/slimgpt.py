"""SlimGPT (Ling et al. 2024, "SlimGPT: Layer-wise Structured Pruning for Large Language Models")."""

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from lightning_prune.calibration.hooks import Hooks
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import BlockPass, Holding, Load, Pass, Step
from lightning_prune.calibration.statistics.gram import InputGram
from lightning_prune.checkpoint.cut import unpruned
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.methods.base import PruningMethod
from lightning_prune.methods.columns import columns_of, in_columns, named
from lightning_prune.methods.scores import group_scores
from lightning_prune.methods.selection import groups_that_stay
from lightning_prune.methods.slimgpt_math import (
    HeadError,
    choose_dtype,
    group_size_schedule,
    inverse_hessian,
    prune_units,
    solve_bytes,
)
from lightning_prune.methods.slimgpt_ratios import layer_ratios, unit_counts
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import OUTPUT_ROLE, Block
from lightning_prune.support.devices import widest
from lightning_prune.support.errors import UserError


class SlimGPTPass(BlockPass):
    """Prunes and refits o, then down, of every layer on what the pruned part before it outputs; the rows of q, k, v or
    gate, up that fed them can then be dropped. ``counts``: (groups, channels) to remove from every layer;
    ``max_tokens``: of this process."""

    name = "slimgpt"

    def __init__(self, method: "SlimGPT", counts: list[tuple[int, int]], max_tokens: int) -> None:
        self.method, self.counts, self.max_tokens = method, counts, max_tokens

    def observe(self, view: LayerStructure, block: Block, hooks: Hooks) -> None:
        role, linear = OUTPUT_ROLE[block], view.projection(block)
        if not linear.in_features:
            return
        self.gram = InputGram(linear.in_features, self.max_tokens).to(self.model.device)
        hooks.on_input(f"layer {view.index}, input of {role}", linear.module, self.gram.update)

    def conclude(self, view: LayerStructure, block: Block) -> LayerResult:
        """The refitted weight, zero in the removed columns; the error of every unit as its importance. Facts: units
        ``kept``, the ``damping`` λ that was used, and the solver's ``dtype``."""
        role, linear = OUTPUT_ROLE[block], view.projection(block)
        if not linear.in_features:
            return LayerResult({block: torch.zeros(0)}, facts={"kept": []})
        gram = self.gram
        del self.gram
        width = linear.in_features // view.units(block)
        count = self.counts[view.index][block is Block.MLP]
        rounds = [1] * count if block is Block.ATTENTION else group_size_schedule(count, self.method.ffn_group_size)
        finished, kind = self.setting.finished, self.method.head_score
        with named(f"layer {view.index}, {role} projection"):
            xtx = gram.matrix()
            samples = max(1, int(gram.tokens) // self.setting.seq_len)
            gram.give_up()
            del gram
            dtype = choose_dtype(len(xtx), self.setting.free_bytes(xtx.device), widest(xtx.device))
            hessian = inverse_hessian(xtx, samples, self.method.damping, dtype)
            del xtx
            finished(0.5)
            result = prune_units(linear.weight, hessian, rounds, width, kind, lambda share: finished(0.5 * share))
            refitted = in_columns(columns_of(result.kept, width), result.weight, linear.weight)
        solver = str(dtype).removeprefix("torch.")
        facts = {"kept": result.kept.tolist(), "damping": hessian.damping, "dtype": solver}
        return LayerResult({block: result.errors}, {role: refitted}, facts=facts)

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        """Memory of a block pass, and XᵀX of one projection with its solver."""
        base = super().holds(view, load)
        shapes = [view.projection(block).weight.shape for block in view.prunable]
        solve = max((solve_bytes(n, d, load.free, load.accelerated) for d, n in shapes), default=0)
        return replace(base, running=base.running + 4 * load.widest_input**2, finishing=solve)

    def cost(self, view: LayerStructure, step: Step) -> float:
        """Work per token: the block, and the square of its inner width for XᵀX."""
        if (block := self.block(step)) is Block.MIXER:
            return view.block_cost(block) / view.num_weights
        inner = view.projection(block).in_features
        weights = sum(linear.weight.numel() for linear in view.parts[block].linears.values())
        return (weights + inner * inner / 2) / view.num_weights

    def cost_to_finish(self, view: LayerStructure, step: Step) -> float:
        """Work of H⁻¹, n³ operations, where a token takes two for every weight of the layer."""
        if (block := self.block(step)) is Block.MIXER:
            return 0.0
        return view.projection(block).in_features ** 3 / (2 * view.num_weights)


class SlimGPT(PruningMethod):
    """SlimGPT: layer-wise optimal brain surgeon for attention groups and MLP channels, with weight compensation.

    With ``refit`` its compensation only serves to select: what is kept is then fitted anew from the dense weights.

    Args:
        head_score: Error of removing a head (or GQA group): slimgpt is the paper's grouped Cholesky, exact the true
            joint error of its columns.
        ffn_group_size: MLP channels to remove before errors are computed again: a number, or dynamic, the authors'
            schedule that shrinks from 1024 to 64 as fewer are left to remove.
        first_ratio: Ratio of the first layer; later layers lose more, logarithmically. Default: pruning_ratio's share
            of the prunable weights × 0.3125, the paper's proportion for 20 % of LLaMA-7B.
        damping: λ, added to the Hessian's diagonal times its mean. Raised tenfold, and reported, where the Hessian is
            not positive definite with it.
        max_tokens: Take Hessians over at most this many calibration tokens.
    """

    reusable = False

    def __init__(
        self,
        pretrained: str = "demo",
        pruning_ratio: float = 0.2,
        head_score: HeadError = "slimgpt",
        ffn_group_size: int | Literal["dynamic"] = "dynamic",
        first_ratio: float | None = None,
        damping: float = 0.01,
        max_tokens: int = 128_000,
        **run_options: Any,
    ) -> None:
        super().__init__(pretrained, pruning_ratio, **run_options)
        if not 0 <= damping <= 1:
            raise UserError(f"--model.damping: found {damping:g}; it must lie between 0 and 1.")
        if max_tokens < 1:
            raise UserError(f"--model.max_tokens: found {max_tokens}; it must be 1 or more.")
        if ffn_group_size != "dynamic" and ffn_group_size < 1:
            raise UserError(f"--model.ffn_group_size: found {ffn_group_size}; it must be 1 or more, or dynamic.")
        if first_ratio is not None and not 0 <= first_ratio < 1:
            raise UserError(f"--model.first_ratio: found {first_ratio:g}; it must lie in [0, 1).")
        self.head_score: HeadError = head_score
        self.ffn_group_size: int | Literal["dynamic"] = ffn_group_size
        self.first_ratio = first_ratio
        self.damping = damping
        self.max_tokens = max_tokens

    def layer_counts(
        self, layers: list[LayerStructure], total_parameters: int
    ) -> tuple[list[float], list[tuple[int, int]]]:
        """Ratio of every layer, and how many (groups, channels) that removes; UserError where a layer would not keep
        one of each."""
        budget = math.floor(self.ratio * total_parameters)
        head_cost, channel_cost = (max(view.unit_cost(block) for view in layers) for block in OUTPUT_ROLE)
        heads, channels = ([view.units(block) for view in layers] for block in OUTPUT_ROLE)
        if layers[0].whole_attention:
            heads, head_cost = [min(1, count) for count in heads], 0
        prunable = sum(heads) * head_cost + sum(channels) * channel_cost
        least = sum(map(bool, heads)) * head_cost + sum(map(bool, channels)) * channel_cost
        largest = (prunable - least) / total_parameters
        try:
            ratios = layer_ratios(len(layers), budget / prunable, self.first_ratio)
            counts = unit_counts(ratios, heads, channels, head_cost, channel_cost, budget)
        except ValueError as error:
            raise UserError(
                f"--model.pruning_ratio: {float(self.ratio):g} cannot be reached ({error}) The largest reachable "
                f"ratio is at most {math.floor(largest * 1e4) / 1e4:.4f} of all parameters. Lower "
                f"--model.pruning_ratio or leave out --model.first_ratio.{groups_that_stay(layers)}"
            ) from None
        return ratios, counts

    def check_ratio(self, layers: list[LayerStructure], total_parameters: int) -> None:
        def keep() -> list[LayerPlan]:  # which units are removed changes no size
            kept = unpruned(layers)
            for plan, counts in zip(kept, self.layer_counts(layers, total_parameters)[1], strict=True):
                for block, count in zip(OUTPUT_ROLE, counts, strict=True):
                    if count:
                        plan.kept[block] = plan.kept[block][count:]
            return kept

        self.meet_target(keep, layers, total_parameters)
        self.layer_counts(layers, total_parameters)

    def passes(self) -> list[Pass]:
        self.ratios, self.counts = self.layer_counts(self.layers, self.dense_parameters)
        tokens = self.max_tokens // self.trainer.world_size
        return [SlimGPTPass(self, self.counts, tokens)]

    def decide(self) -> None:
        """The passes have decided. The score of a unit is its error when it was removed."""
        kept, importance = unpruned(self.layers), [dict[Block, torch.Tensor]() for _ in self.layers]
        self.damping_used: dict[str, list[float | None]] = {role: [] for role in OUTPUT_ROLE.values()}
        dtypes = set()
        for step, result in self.driver.loop.results_of("slimgpt"):
            importance[step.layer] |= result.importance
            for block in result.importance:
                kept[step.layer].kept[block] = result.facts["kept"]
                self.damping_used[OUTPUT_ROLE[block]].append(result.facts.get("damping"))
                dtypes |= {result.facts["dtype"]} if "dtype" in result.facts else set()
        self.solver_dtypes = sorted(dtypes)
        scores = group_scores(self.layers, importance)
        pruned = np.ones(len(scores.unit), dtype=bool)
        for (layer, block), rows in scores.blocks.rows().items():
            pruned[rows[kept[layer].kept[block]]] = False
        self.scores = replace(scores, score=scores.importance, base=scores.importance, pruned=pruned)
        self.plan = self.make_plan(kept, weights_updated=True)

    def details(self) -> dict[str, Any]:
        return {
            "head_score": self.head_score,
            "ffn_group_size": self.ffn_group_size,
            "damping": self.damping,
            "damping_used": self.damping_used,
            "solver_dtype": ", ".join(self.solver_dtypes),
            "max_tokens": self.max_tokens,
            "layer_ratios": self.ratios,
            "removed_groups_and_channels": self.counts,
            **super().details(),
        }
