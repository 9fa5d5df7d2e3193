"""What experts and their channels are worth, from sums over the tokens routed to them.

E experts of width m, shared ones included. A token that is not routed to an expert adds nothing, so losses are means
over all tokens and experts compare with each other; an expert without tokens is worth 0.
"""

from torch import Tensor

from lightning_prune.calibration.statistics.routed import RoutedOutputs, RoutedSlopes
from lightning_prune.models.experts import Experts

SUPER_QUANTILE, SUPER_SHARE = 0.995, 0.1


def magnitude(experts: Experts) -> Tensor:
    """Σ |w| over the channel's weights, fp32 ``[E, m]``."""
    return experts.channel_sums(lambda role, expert: _weight(experts, role, expert).float().abs())


def wanda(sums: RoutedOutputs) -> Tensor:
    """Σ |W_ij|·‖X_j‖₂ over the channel's weights, ``[E, m]`` (Wanda, eq. 1), over the tokens routed to the expert.

    Each counts with the router's weight g, by which the expert's output is multiplied: ‖X_j‖₂ = √(Σ_t g_t²·x_tj²).
    """
    experts = sums.experts[0]
    norms = {"inner": sums.inputs.sqrt().float(), "down": sums.inner.sqrt().float()}
    return experts.channel_sums(lambda role, expert: _weight(experts, role, expert).float().abs() * norms[role][expert])


def reap(sums: RoutedOutputs) -> Tensor:
    """S_e = mean over the expert's tokens of g·‖f_e(x)‖₂, ``[E]`` (REAP, Lasby et al. 2025, arXiv 2510.13999), with g
    as the model uses it: renormalised over the chosen experts where the model does so."""
    return sums.gated / sums.counts.clamp_min(1)


def heapr(sums: RoutedSlopes) -> Tensor:
    """I_k = E[a_k²]·w_kᵀ·G·w_k, ``[E, m]`` (HEAPr, Li et al. 2025, arXiv 2509.22299), with G = E[δ·δᵀ] the second
    moment of the loss's gradient at the expert's output, both over the tokens routed there, times their
    share of all tokens.

    w_kᵀ·G·w_k is the mean square of the slope along w_k, so that no matrix of the hidden size is needed.
    """
    return sums.inner * sums.slopes / (sums.counts.clamp_min(1)[:, None] * sums.tokens)


def fisher(sums: RoutedSlopes) -> Tensor:
    """Mean over all tokens of (∂L/∂m_k)², with m_k a factor on the channel's activation, ``[E, m]``."""
    return sums.products / sums.tokens


def super_experts(peaks: Tensor) -> Tensor:
    """Experts without which a model breaks, bool ``[L, E]`` (Su et al. 2025, "Unveiling Super Experts in
    Mixture-of-Experts Large Language Models"): the largest |f_e(x)_j| of all tokens, ``peaks``, lies above the 99.5th
    percentile of all experts of all layers, and above a tenth of the largest."""
    return (peaks > peaks.quantile(SUPER_QUANTILE)) & (peaks > SUPER_SHARE * peaks.max())


def _weight(experts: Experts, role: str, expert: int) -> Tensor:
    return experts.part(role, expert).detach()
