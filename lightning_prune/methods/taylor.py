"""Taylor importance of groups (LLM-Pruner, Ma et al. 2023, section 3.2; first order as in its ``param_first``).

Removing a weight w changes the loss L by about |w·g|, g = ∂L/∂w; the second-order variant adds ½·w²·h with h a diagonal
estimate of the curvature. L is the mean token loss over the whole calibration set, so g is summed with its sign and the
absolute value is taken once, at the end.
"""

from dataclasses import replace

from torch import Tensor

from lightning_prune.calibration.backward import BackwardPass
from lightning_prune.calibration.passes import Finding, Holding, Load
from lightning_prune.calibration.statistics.gradients import LayerGradients
from lightning_prune.calibration.statistics.groups import group_importance
from lightning_prune.models.families import LayerAnatomy


def weight_scores(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w·g|, fp32, shaped like both. ``gradient`` is overwritten: it is as large as the weight."""
    return gradient.mul_(weight).abs_()


def second_order_term(weight: Tensor, sample_gradient: Tensor) -> Tensor:
    """½·w²·g_i² of one sample i; its mean over the samples is ½·w²·h with h = (1/N) Σ_i g_i².

    h is taken per sample, not per batch, because then it depends neither on the batch size nor on which samples share
    a batch. ½·w²·h is quadratically small: expect it to hardly move a ranking.
    """
    return 0.5 * (weight.float() * sample_gradient).square()


class TaylorPass(BackwardPass):
    """I(G) = Σ |w·g| over every weight of the group, with ``second_order`` plus Σ ½·w²·h."""

    name = "importance"

    def __init__(self, second_order: bool = False, priors: bool = False) -> None:
        self.second_order = self.per_sample = second_order
        self.priors = priors

    def watch(self, view: LayerAnatomy) -> None:
        """One layer's accumulators."""
        self.gradients = LayerGradients(view, second_order_term if self.second_order else None)

    def expect(self, samples: int, tokens: int) -> None:
        """Tell the accumulators."""
        self.gradients.expect(samples, tokens)

    def holds(self, view: LayerAnatomy, load: Load) -> Holding:
        """Also an fp32 gradient of every weight of the layer, and the one that backward has just made."""
        base = super().holds(view, load)
        sums = 4 * load.layer_weights
        new = load.largest_weight * (load.dtype.itemsize + (12 if self.second_order else 0))
        return replace(base, running=base.running + sums + new, finishing=sums + 2 * load.largest_weight)

    def conclude(self, view: LayerAnatomy) -> Finding:
        """Importance per unit; the accumulators are freed one projection at a time."""
        gradients = self.gradients
        gradients.remove()
        groups, channels = group_importance(
            view, lambda role: weight_scores(view.linears[role].weight, gradients.take(role))
        )
        if self.second_order:
            groups = groups + sum(gradients.terms_of(role) for role in ("query", "key", "value", "output"))
            channels = channels + sum(gradients.terms_of(role) for role in ("gate", "up", "down"))
        del self.gradients
        return {"attention": groups, "mlp": channels}
