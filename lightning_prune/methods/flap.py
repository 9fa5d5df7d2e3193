"""FLAP (An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models"), its selection.

A channel that hardly fluctuates can be replaced by its mean. For input channel j of o_proj and down_proj, with v_j its
variance over the calibration tokens,

    WIFV_j = v_j · Σ_i W_ij²

is standardised within the layer's projection, z_j = (WIFV_j − mean) / std, so that all layers rank together.

The released code's variance is built per sample and depends on their order, and it squares the attention metric before
it is standardised; here both are as the paper defines them. A GQA group has the mean z of its query heads' columns (the
code knows multi-head attention only). The importance in the records is mean WIFV / std; z is that less its mean.

The bias that takes over the removed channels' mean is left out: o_proj and down_proj of most families have none that
could carry it. A refit (``refit``) does what it does and more, in the weights that are there.
"""

from dataclasses import replace

from torch import Tensor

from lightning_prune.methods.blocks import block_index
from lightning_prune.methods.group_pruning import GroupPruning
from lightning_prune.methods.scores import Scores
from lightning_prune.models.families import LayerAnatomy
from lightning_prune.statistics.hooks import Hooks
from lightning_prune.statistics.input_moments import InputMoments
from lightning_prune.walk.passes import Finding, ForwardPass, Pass


def weighted_fluctuation(weight: Tensor, variance: Tensor) -> Tensor:
    """WIFV_j = v_j · Σ_i W_ij², float64 ``[in]``.

    Args:
        weight: W ``[out, in]``, any float dtype.
        variance: v float64 ``[in]``.
    """
    return variance * weight.float().square().sum(0).double()


def in_deviations(metric: Tensor, units: int) -> Tensor:
    """Mean of a metric over each unit's channels, in standard deviations (unbiased) of all channels, ``[units]``.

    0 where all channels agree.
    """
    spread = metric.std()
    return metric.reshape(units, -1).mean(1) / spread if float(spread) > 0 else metric.new_zeros(units)


def standardised(scores: Scores) -> Tensor:
    """z ``[U]``: importance less its mean over the units of the same block of the same layer."""
    z = scores.importance.clone()
    for rows in block_index(scores).rows().values():
        z[rows] -= z[rows].mean()
    return z


class FLAPPass(ForwardPass):
    """Importance per unit, from what o_proj and down_proj read."""

    name = "importance"

    def observe(self, view: LayerAnatomy, hooks: Hooks) -> None:
        """Watch the two inputs."""
        self.moments: dict[str, InputMoments] = {}
        for role in ("output", "down"):
            linear = view.linears[role]
            self.moments[role] = InputMoments(linear.in_features).to(linear.weight.device)
            hooks.on_input(f"layer {view.index}, input of {role}", linear.module, self.moments[role].update)

    def conclude(self, view: LayerAnatomy) -> Finding:
        """Mean WIFV / std per GQA group and per channel."""
        found = {}
        for role, units in (("output", view.num_kv_heads), ("down", view.num_channels)):
            moments = self.moments[role]
            moments.raise_if_not_finite(f"layer {view.index}, input of {role}")
            metric = weighted_fluctuation(view.linears[role].weight, moments.reduced().reshape(2, -1)[1])
            found[role] = in_deviations(metric, units)
        return {"attention": found["output"], "mlp": found["down"]}


class FLAP(GroupPruning):
    """FLAP: removes the channels and GQA groups that fluctuate least, all layers ranked together by standard scores.

    Args:
        options: Options of group pruning.
    """

    def passes(self) -> list[Pass]:
        """One forward over the decoder."""
        return [FLAPPass()]

    def score(self, scores: Scores) -> Scores:
        """z itself, not z per parameter; the number of parameters only counts for the ratio."""
        z = standardised(scores)
        return replace(scores, base=z, score=z)
