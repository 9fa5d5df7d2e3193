"""HEAPr (Li et al. 2025, "HEAPr: Hessian-based Efficient Atomic Expert Pruning in Output Space", arXiv 2509.22299).

A channel of an expert is its two input rows and its output column w_k: it adds a_k·w_k to the expert's output. To
second order in what is missing there, the loss grows by E[a_k²]·w_kᵀ·G·w_k without it, G the second moment of the
loss's gradient at the expert's output: K-FAC importance (``methods.kfac``) without the others compensating.
"""

from lightning_prune.calibration.passes import Pass
from lightning_prune.methods.expert_scores import heapr
from lightning_prune.methods.fisher import FisherPass
from lightning_prune.methods.group_pruning import GroupPruning


class HEAPrPass(FisherPass):
    """I per channel of experts; GQA groups and MLP channels have Fisher's."""

    expert_score = staticmethod(heapr)


class HEAPr(GroupPruning):
    """HEAPr: removes the channels inside experts without which the loss grows least, to second order.

    The paper ranks all channels of the model together; here every expert loses equally many, so that the model stays
    one that every runtime knows.
    """

    experts = "only"

    def passes(self) -> list[Pass]:
        return [HEAPrPass()]
