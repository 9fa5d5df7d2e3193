"""HEAPr (Li et al. 2025, "HEAPr: Hessian-based Efficient Atomic Expert Pruning in Output Space", arXiv 2509.22299)."""

from torch import Tensor

from lightning_prune.calibration.passes import Pass
from lightning_prune.calibration.statistics.routed import RoutedSlopes
from lightning_prune.methods.fisher import FisherPass
from lightning_prune.methods.group_pruning import GroupPruning


class HEAPrPass(FisherPass):
    """I per channel of experts; GQA groups and MLP channels have Fisher's."""

    @staticmethod
    def expert_score(sums: RoutedSlopes) -> Tensor:
        """I_k = E[a_k²]·w_kᵀ·G·w_k, ``[E, m]``: to second order, how the loss grows without a_k·w_k in the output.

        G = E[δ·δᵀ] is the second moment of the loss's gradient there. Both are over the tokens routed to the expert,
        times their share of all. w_kᵀ·G·w_k is the mean square of the slope along w_k, so that no matrix is needed.
        """
        return sums.inner * sums.slopes / (sums.counts.clamp_min(1)[:, None] * sums.tokens)


class HEAPr(GroupPruning):
    """HEAPr: removes the channels inside experts without which the loss grows least, to second order.

    The paper ranks all channels of the model together; here every expert loses equally many, so that the model stays
    one that every runtime knows.
    """

    experts = "only"

    def passes(self) -> list[Pass]:
        return [HEAPrPass()]
