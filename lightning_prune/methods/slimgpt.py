"""SlimGPT (Ling et al. 2024, "SlimGPT: Layer-wise Structured Pruning for Large Language Models").

Layer by layer, and within a layer attention before the MLP, the columns of o and down that cost least are removed and
the others are refitted to the layer's own output (``slimgpt_math``). The rows of q, k, v or gate, up that fed them are
then dropped, which is exact. Every Hessian is taken on what the already pruned part of the model puts out.
"""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_prune.errors import UserError
from lightning_prune.methods.base import PruningMethod
from lightning_prune.methods.scores import group_scores
from lightning_prune.methods.slimgpt_math import (
    HeadError,
    InverseHessian,
    NotPositiveDefiniteError,
    PrunedLinear,
    group_size_schedule,
    inverse_hessian,
    prune_channels,
    prune_heads,
)
from lightning_prune.methods.slimgpt_ratios import layer_ratios, unit_counts
from lightning_prune.statistics.hessian import InputGram
from lightning_prune.surgery.anatomy import LayerAnatomy
from lightning_prune.surgery.cut import parameters_after
from lightning_prune.surgery.plan import LayerPlan


class SlimGPT(PruningMethod):
    """SlimGPT: layer-wise optimal brain surgeon for attention groups and MLP channels, with weight compensation.

    Args:
        pretrained: Model folder or hub id to prune. ``demo`` is the small model inside the package.
        pruning_ratio: Share of all parameters (embeddings and head included) to remove, between 0 and 1.
        head_score: Error of removing a head (or GQA group): slimgpt is the paper's grouped Cholesky, exact the true
            joint error of its columns.
        ffn_group_size: MLP channels to remove before errors are computed again: a number, or dynamic, the paper's
            schedule that shrinks as fewer are left to remove.
        first_ratio: Ratio of the first layer; later layers lose more, logarithmically. Default: pruning_ratio's share
            of the prunable weights × 0.3125, the paper's proportion for 20 % of LLaMA-7B.
        damping: λ, added to the Hessian's diagonal times its mean. Raised tenfold, and reported, where the Hessian is
            not positive definite with it.
        max_tokens: Take Hessians over at most this many calibration tokens.
        label: Name of this system in run folders, TensorBoard and tables. Default: slimgpt.
    """

    reusable = False
    epochs_per_layer = 2  # attention, then the MLP on what the pruned attention puts out

    def __init__(
        self,
        pretrained: str = "demo",
        pruning_ratio: float = 0.2,
        head_score: HeadError = "slimgpt",
        ffn_group_size: int | Literal["dynamic"] = "dynamic",
        first_ratio: float | None = None,
        damping: float = 0.01,
        max_tokens: int = 128_000,
        label: str | None = None,
    ) -> None:
        super().__init__(pretrained, pruning_ratio, label)
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
        self.pruned: dict[tuple[int, str], PrunedLinear] = {}

    @property
    def layerwise(self) -> bool:
        """Always."""
        return True

    def layer_counts(
        self, layers: list[LayerAnatomy], total_parameters: int
    ) -> tuple[list[float], list[tuple[int, int]]]:
        """Ratio of every layer, and how many (groups, channels) that removes.

        Raises:
            UserError: the ratio cannot be reached while every layer keeps a group and a channel.
        """
        view = layers[0]
        budget = math.floor(Fraction(str(self.pruning_ratio)) * total_parameters)
        groups, channels = view.num_kv_heads * view.attention_unit_cost, view.num_channels * view.mlp_unit_cost
        least = view.attention_unit_cost + view.mlp_unit_cost
        largest = len(layers) * (groups + channels - least) / total_parameters
        try:
            ratios = layer_ratios(len(layers), budget / (len(layers) * (groups + channels)), self.first_ratio)
            counts = unit_counts(
                ratios, view.num_kv_heads, view.num_channels, view.attention_unit_cost, view.mlp_unit_cost, budget
            )
        except ValueError as error:
            raise UserError(
                f"--model.pruning_ratio: {self.pruning_ratio:g} cannot be reached ({error}) The largest reachable "
                f"ratio is at most {math.floor(largest * 1e4) / 1e4:.4f} of all parameters. Lower "
                "--model.pruning_ratio or leave out --model.first_ratio."
            ) from None
        return ratios, counts

    def check_ratio(self, layers: list[LayerAnatomy], total_parameters: int) -> None:
        """The counts depend on shapes alone."""
        self.layer_counts(layers, total_parameters)

    def on_fit_start(self) -> None:
        """Fix every layer's share before the first Hessian."""
        super().on_fit_start()
        self.ratios, self.counts = self.layer_counts(self.layers, self.dense_parameters)

    @property
    def role(self) -> Literal["output", "down"]:
        """The projection whose inputs this epoch measures."""
        return "down" if self.current_epoch % self.epochs_per_layer else "output"

    def attach(self) -> None:
        """One Hessian at a time."""
        linear = self.current_layer.linears[self.role]
        self.gram = InputGram(linear.in_features, self.max_tokens // self.trainer.world_size).to(self.device)
        self.hooks.on_input(f"layer {self.current_layer.index}, input of {self.role}", linear, self.gram.update)

    def finish_epoch(self) -> None:
        """Prune and refit this projection in place; removed columns are zero until they are cut out."""
        view, role = self.current_layer, self.role
        linear = view.linears[role]
        name = f"layer {view.index}, {role} projection"
        samples = min(self.max_tokens, self.datamodule.calibration.tokens.numel()) // self.datamodule.seq_len
        try:
            hessian = inverse_hessian(self.gram.matrix().double(), max(1, samples), self.damping)
            result = self._prune(view, role, hessian)
        except (NotPositiveDefiniteError, FloatingPointError) as error:
            raise FloatingPointError(f"{name}: {error}") from None
        width = linear.in_features // len(result.errors)
        columns = (result.kept[:, None] * width + torch.arange(width, device=result.kept.device)).flatten()
        refitted = torch.zeros_like(linear.weight)  # of its own: an untouched fp64 weight is the result itself
        refitted[:, columns] = result.weight.to(refitted.dtype)
        linear.weight.copy_(refitted)
        self.pruned[view.index, role] = replace(result, weight=torch.empty(0))
        del self.gram

    def _prune(self, view: LayerAnatomy, role: str, hessian: InverseHessian) -> PrunedLinear:
        groups, channels = self.counts[view.index]
        if role == "output":
            width = view.output.in_features // view.num_kv_heads
            return prune_heads(view.output.weight, hessian, groups, width, self.head_score)
        return prune_channels(view.down.weight, hessian, group_size_schedule(channels, self.ffn_group_size))

    def decide(self) -> None:
        """Everything is decided; write it down. The score of a unit is its error when it was removed."""
        attention: list[Tensor] = []
        mlp: list[Tensor] = []
        kept: list[LayerPlan] = []
        removed: list[Tensor] = []
        for view in self.layers:
            heads, channels = self.pruned[view.index, "output"], self.pruned[view.index, "down"]
            attention.append(heads.errors)
            mlp.append(channels.errors)
            kept.append(LayerPlan(view.index, heads.kept.tolist(), channels.kept.tolist()))
            removed += [_removed(heads), _removed(channels)]
        scores = group_scores(self.layers, attention, mlp)
        self.scores = replace(scores, score=scores.importance, base=scores.importance, pruned=torch.cat(removed))
        left = parameters_after(self.layers, self.dense_parameters, kept)
        self.plan = self.make_plan(kept, left, weights_updated=True)

    def details(self) -> dict[str, Any]:
        """Ratios, the damping that was needed, and the head score."""
        return {
            "head_score": self.head_score,
            "ffn_group_size": self.ffn_group_size,
            "damping": self.damping,
            "damping_used": {
                role: [self.pruned[view.index, role].damping for view in self.layers] for role in ("output", "down")
            },
            "max_tokens": self.max_tokens,
            "layer_ratios": self.ratios,
            "removed_groups_and_channels": self.counts,
            **super().details(),
        }


def _removed(linear: PrunedLinear) -> Tensor:
    removed = torch.ones(len(linear.errors), dtype=torch.bool)
    removed[linear.kept.cpu()] = False
    return removed
