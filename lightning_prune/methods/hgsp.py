"""H-GSP: hybrid global structural pruning. All groups G of all layers are ranked together by S(G)·B(G)^T, with S the
importance per parameter, B the depth prior: how much the loss grows without G's layer, or its block, and T an exponent.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_prune.calibration.backward import BackwardPass
from lightning_prune.calibration.passes import Pass
from lightning_prune.calibration.wavefront import PIECES, RemovalPass
from lightning_prune.checkpoint.scores import BLOCKS, Flags, Scores
from lightning_prune.methods.fisher import FisherPass
from lightning_prune.methods.group_pruning import GroupPruning
from lightning_prune.methods.kfac import GradientPass, KFACPass
from lightning_prune.methods.magnitude import MagnitudePass
from lightning_prune.methods.measurement import SavedMeasurement
from lightning_prune.methods.selection import best_attention
from lightning_prune.methods.taylor import TaylorPass
from lightning_prune.methods.wanda import WandaPass
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import ROLES_OF, Block
from lightning_prune.support.errors import UserError

Importance = Literal["taylor", "fisher", "kfac", "wanda", "magnitude"]
# Importances that differentiate the loss.
GRADIENTS: dict[str, type[BackwardPass]] = {"taylor": TaylorPass, "fisher": FisherPass, "kfac": GradientPass}
ScoreNorm = Literal["none", "kind", "block"]


def depth_prior(delta: Tensor, tau: float) -> Tensor:
    """B = ln(1 + max(Δ, 0)) fp64 ``[2, L]`` of attention and MLP groups, with Δ of the layer where Δ_layer < τ, else of
    the group's own block. τ = 0 means block-wise always, also for a negative Δ_layer.

    Args:
        delta: ``[3, L]``: loss increase in nats without the layer, its attention, its MLP.
        tau: gate threshold in nats.
    """
    chosen = torch.where((delta[0] < tau) & (tau != 0), delta[0], delta[1:])
    return torch.log1p(chosen.double().clamp_min(0))


def normalised(scores: Scores, how: ScoreNorm) -> Tensor:
    """S ``[U]`` fp64, divided by its median over all units of a kind (attention, MLP), or by its mean over the units of
    one block of one layer."""
    base = torch.tensor(scores.base)
    if how == "kind":
        for block in ROLES_OF:
            kind = torch.from_numpy(scores.of_kind(block))
            base[kind] /= base[kind].median()
    elif how == "block":
        for rows in scores.blocks.rows().values():
            base[rows] /= base[rows].mean()
    return torch.nan_to_num(base, nan=0.0) if how != "none" else base


class HGSP(GroupPruning):
    """H-GSP: one global ranking of GQA groups and MLP channels, weighed by how much their layer or block matters.

    Args:
        importance: What a group is worth: taylor (sum of |w·g|), fisher (mean square, over tokens, of the loss's slope
            along the group), kfac (loss increase after the block's remaining groups are refitted), wanda (sum of
            |w|·‖x‖) or magnitude (sum of |w|).
        prior: How layers and blocks are weighed: removal (loss increase without them) or gradient (an estimate of it
            that the pass of taylor, fisher or kfac gives, at no extra evaluation).
        gradient_samples: With kfac, differentiate the loss for so many calibration samples only, from the front of the
            shared set; the inputs are observed on all. Default: all. Experts are always measured on all.
        prior_num_samples: Calibration samples for the prior, taken from the front of the shared set. Default: all;
            50 is the original setting.
        tau: Gate τ in nats. Layers whose removal costs less are weighed as a whole, others block by block. Default:
            25th percentile over the layers; 0 always by block; .inf always by layer.
        temperature: T, exponent of the prior. 0 switches the prior off, and it is not computed.
        collapse_epsilon: ε. A layer whose mean kept fraction of groups and channels is below it is removed whole.
        score_norm: Divide importance per parameter by its median per kind or its mean per block before the prior.
    """

    experts = True

    decision_options = (*GroupPruning.decision_options, "tau", "temperature", "collapse_epsilon", "score_norm")

    def __init__(
        self,
        pretrained: str = "demo",
        pruning_ratio: float = 0.2,
        importance: Importance = "taylor",
        prior: Literal["removal", "gradient"] = "removal",
        gradient_samples: int | None = None,
        prior_num_samples: int | None = None,
        tau: float | None = None,
        temperature: float = 1.0,
        collapse_epsilon: float = 0.0,
        score_norm: ScoreNorm = "none",
        **group_options: Any,
    ) -> None:
        super().__init__(pretrained, pruning_ratio, **group_options)
        if not 0 <= temperature < math.inf:
            raise UserError(f"--model.temperature: found {temperature:g}; it must be a finite number of 0 or more.")
        if tau is not None and not tau >= 0:
            raise UserError(f"--model.tau: found {tau:g}; it must be 0 or more nats, or .inf.")
        if not 0 <= collapse_epsilon < 1:
            raise UserError(f"--model.collapse_epsilon: found {collapse_epsilon:g}; it must lie in [0, 1).")
        if prior_num_samples is not None and prior_num_samples < 1:
            raise UserError(f"--model.prior_num_samples: found {prior_num_samples}; it must be 1 or more.")
        if gradient_samples is not None and (importance != "kfac" or gradient_samples < 1):
            raise UserError(
                f"--model.gradient_samples: found {gradient_samples} with importance {importance}; allowed: 1 or more, "
                "with --model.importance kfac only. Leave it out, or set it to null where a configuration has it."
            )
        if prior == "gradient" and importance not in GRADIENTS:
            raise UserError(
                f"--model.prior gradient comes out of a backward pass; importance {importance} makes none. Use "
                "--model.importance taylor, fisher or kfac, or --model.prior removal."
            )
        if prior == "gradient" and prior_num_samples is not None:
            raise UserError(
                f"--model.prior_num_samples: found {prior_num_samples}; --model.prior gradient comes out of a pass "
                "over every sample. Leave it out."
            )
        self.importance = importance
        self.prior = prior
        self.gradient_samples = gradient_samples
        self.prior_num_samples = prior_num_samples
        self.tau = tau
        self.temperature = temperature
        self.collapse_epsilon = collapse_epsilon
        self.score_norm: ScoreNorm = score_norm
        self.measures_text = temperature > 0 or importance != "magnitude"
        self.priors: Tensor | None = None
        self.tau_used: float | None = None

    @property
    def method(self) -> str:
        return f"hgsp_{self.importance}"

    def passes(self) -> list[Pass]:
        """The pass of the importance, and that of the prior unless T = 0."""
        passes: list[Pass]
        if self.importance in GRADIENTS:
            priors = self.temperature > 0 and self.prior == "gradient"
            # Of experts it measures all there is, so it sees every sample.
            few = None if any(view.experts for view in self.layers) else self.gradient_samples
            passes = [GRADIENTS[self.importance](priors, few)]
            passes += [KFACPass()] if self.importance == "kfac" else []
            # The refit needs the dense residual stream again, as long as it is that of the dense model.
            if self.refit is not None and self.refit.target == "residual" and self.steps == 1:
                self.dense_stream = passes[-1]
                self.dense_stream.keeps_stream = True
        else:
            passes = [WandaPass() if self.importance == "wanda" else MagnitudePass()]
        if self.temperature > 0 and self.prior == "removal":
            passes.append(RemovalPass(self.prior_num_samples, blocks=self.tau != math.inf))
        return passes

    def reuse(self, saved: SavedMeasurement) -> None:
        super().reuse(saved)
        self.priors = saved_priors(saved.details, self.temperature, self.tau)

    def score(self, scores: Scores) -> Scores:
        if self.saved is None and self.temperature > 0:
            results = self.results("importance" if self.prior == "gradient" else "prior")
            delta = torch.tensor([result.facts["delta"] for result in results if result.facts], dtype=torch.float64)
            self.priors = delta[0] if self.prior == "removal" else delta.T.contiguous()
        if self.temperature > 0:
            assert self.priors is not None
            # Over all layers, frozen ones included.
            self.tau_used = float(np.percentile(self.priors[0].numpy(), 25)) if self.tau is None else self.tau
        return final_scores(scores, self.priors, self.tau_used, self.temperature, self.score_norm)

    def select(self, scores: Scores, layers: list[LayerStructure], total_parameters: int) -> Flags:
        """The ranking's choice, then auto-collapse of layers that are almost empty; nothing is refilled."""
        pruned = super().select(scores, layers, total_parameters)
        frozen = self.selection.frozen_layers(len(layers))
        frozen |= set(scores.layer[best_attention(scores, layers)].tolist())
        return collapse(replace(scores, pruned=pruned), self.collapse_epsilon, frozen)

    def details(self) -> dict[str, Any]:
        """Details with priors and gate, so that the decision can be made again with other options."""
        prior = {
            "measure": self.prior,
            "unit": "nats of mean token loss",
            "num_samples": self.prior_num_samples,
            "delta": None if self.priors is None else dict(zip(PIECES, self.priors.tolist(), strict=True)),
        }
        return {
            "importance": self.importance,
            "gradient_samples": self.gradient_samples,
            "prior": prior,
            "tau": self.tau_used,
            "temperature": self.temperature,
            "collapse_epsilon": self.collapse_epsilon,
            "score_norm": self.score_norm,
            **super().details(),
        }


def final_scores(
    scores: Scores, delta: Tensor | None, tau: float | None, temperature: float, score_norm: ScoreNorm
) -> Scores:
    """final = S · B^T for every unit, from measured priors ``delta`` ``[3, L]``; with temperature 0 it is S itself.

    Raises:
        FloatingPointError: a prior is not finite; names the layers.
        UserError: it is not when raised to the power of the temperature.
    """
    base = normalised(scores, score_norm)
    prior = torch.ones_like(base)
    if delta is not None and tau is not None and temperature > 0:
        factor = depth_prior(delta, tau)
        bad = (~torch.isfinite(factor)).any(0).nonzero().flatten().tolist()
        if bad:
            raise FloatingPointError(f"layers {bad}: the measured prior is NaN or infinite.")
        places = np.array([block.place for block in BLOCKS])
        prior = factor[places[scores.code], scores.layer] ** temperature
        if not bool(torch.isfinite(base * prior).all()):
            raise UserError(
                f"--model.temperature: found {temperature:g}; a prior of {float(factor.max()):.3g} to that power is "
                "not finite. Choose a smaller one; 0 omits the priors."
            )
    return replace(scores, base=base.numpy(), prior=prior.numpy(), score=(base * prior).numpy())


def saved_priors(details: dict[str, Any], temperature: float, tau: float | None) -> Tensor | None:
    """Δ ``[3, L]`` of an earlier run's ``method.json``, None where T = 0 needs none; UserError where some lack."""
    delta = details["prior"]["delta"]
    if delta is None and temperature == 0:
        return None
    if delta is None:
        raise UserError(
            f"--model.temperature {temperature:g}: the run was made with temperature 0 and measured no priors. "
            "Decide with --model.temperature 0, or run fit again."
        )
    values = [[math.nan if x is None else x for x in delta[piece]] for piece in PIECES]
    priors = torch.tensor(values, dtype=torch.float64)
    if temperature > 0 and tau != math.inf and bool(priors.isnan().any()):
        raise UserError("--model.tau: the run was made with tau .inf and measured no block priors. Run fit again.")
    return priors


def collapse(scores: Scores, epsilon: float, frozen: set[int]) -> Flags:
    """Remove layers whose kept fraction, the mean over their blocks, is below ε, but not frozen ones and not the last
    layer that is left."""
    fractions = np.stack([scores.kept_fraction(block) for block in (Block.ATTENTION, Block.MLP)])
    kept = np.nansum(fractions, axis=0) / np.maximum(1, (~np.isnan(fractions)).sum(axis=0))
    alive, removed = int((kept > 0).sum()), []
    for layer, part in enumerate(kept):
        if 0 < part < epsilon and layer not in frozen and alive > 1:
            removed.append(layer)
            alive -= 1
    return scores.pruned | np.isin(scores.layer, removed)
