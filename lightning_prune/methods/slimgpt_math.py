"""SlimGPT (Ling et al., 2024): which input columns of one linear to remove, and how the others make up for it.

Symbols: W ``[out, n]`` the weight of o or down; X ``[tokens, n]`` its inputs; H = (2/N)·XᵀX + λ·mean(diag)·I;
ε the rise of tr(ΔW·H·ΔWᵀ) = (2/N)·‖ΔW·Xᵀ‖² when columns go and the others are refitted. A unit is one MLP channel
(1 column) or one GQA group (r·d contiguous columns). Everything runs in the dtype of XᵀX; float64 where memory allows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_prune.statistics.token_statistic import full_precision

HeadError = Literal["slimgpt", "exact"]
MAX_DAMPING = 1.0


class NotPositiveDefiniteError(ValueError):
    """The Hessian has no usable inverse; the caller knows the layer's name and adds it."""


@dataclass(frozen=True)
class InverseHessian:
    """H⁻¹ ``[n, n]`` fp32 or float64; ``dead``: bool ``[n]``, inputs that were 0 on every token; ``damping``: the λ
    that was used, which exceeds the requested one if H was not positive definite with that."""

    inverse: Tensor
    dead: Tensor
    damping: float


@dataclass(frozen=True)
class PrunedLinear:
    """What is left of one linear.

    ``kept``: units, int64, ascending. ``weight``: ``[out, kept·width]``, compensated, in the dtype of H⁻¹. ``errors``:
    ``[units]``, ε when the unit was removed, for a kept one after the last removal. ``damping``: the λ that was used.
    """

    kept: Tensor
    weight: Tensor
    errors: Tensor
    damping: float


def damped_hessian(xtx: Tensor, num_samples: int, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """H = (2/N)·XᵀX + λ·mean(diag)·I and the dead inputs.

    Dead inputs get a diagonal of 1 before the mean is taken, the order of the released code.

    Args:
        xtx: XᵀX ``[n, n]``, fp32 or float64, which is also the dtype of H.
        num_samples: N, the calibration sequences. It cancels from every result but for the 1 of dead inputs.
        damping: λ.

    Returns:
        H ``[n, n]`` and dead, bool ``[n]``.
    """
    hessian = xtx * (2 / num_samples)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    return hessian, dead


def inverse_hessian(xtx: Tensor, num_samples: int, damping: float = 0.01) -> InverseHessian:
    """H⁻¹ at the smallest of λ, 10·λ, 100·λ … ≤ 1 that makes H positive definite (for λ = 0: 0, 0.001, 0.01 …).

    Args: as for ``damped_hessian``. XᵀX comes in undamped because another λ needs the undamped diagonal.

    Raises:
        NotPositiveDefiniteError: no such λ.
        FloatingPointError: XᵀX holds NaN or inf.
    """
    if not bool(torch.isfinite(xtx).all()):
        raise FloatingPointError("XᵀX holds NaN or infinite values.")
    used = damping
    while True:
        hessian, dead = damped_hessian(xtx, num_samples, used)
        inverse = _spd_inverse(hessian)
        if inverse is not None:
            return InverseHessian(inverse, dead, used)
        following = 10 * max(used, 1e-4)
        if following > MAX_DAMPING * (1 + 1e-9):
            raise NotPositiveDefiniteError(
                f"the Hessian is not positive definite, neither at damping {damping:g} nor at {used:g}. "
                "Use more calibration tokens than input channels, or a larger damping."
            )
        used = following


def channel_errors(weight: Tensor, inverse: Tensor) -> Tensor:
    """ε_j = ‖W_:,j‖² / (H⁻¹)_jj ``[n]``: optimal brain surgeon's error of a column over all rows, no ½."""
    return weight.square().sum(0) / inverse.diagonal()


def head_errors(weight: Tensor, inverse: Tensor, width: int, kind: HeadError = "slimgpt") -> Tensor:
    """ε of each unit of ``width`` contiguous columns b, all units batched, ``[n / width]``.

    With A = (H⁻¹)_bb = C·Cᵀ (lower Cholesky):
    ``slimgpt``: Σ_j ‖W_:,j‖² / C_jj², the paper's grouped Cholesky. It knows that the unit's earlier columns are gone
    but uses weights that were not yet compensated for them. ``exact``: tr(W_b·A⁻¹·W_bᵀ), the true joint error.
    """
    units = weight.shape[1] // width
    blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    factor = _cholesky(blocks)
    columns = weight.T.reshape(units, width, -1)
    if kind == "exact":
        whitened: Tensor = torch.linalg.solve_triangular(factor, columns, upper=False)
        return whitened.square().sum((1, 2))
    return (columns.square().sum(2) / factor.diagonal(dim1=1, dim2=2).square()).sum(1)


def compensate(weight: Tensor, inverse: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """Remove columns P and let the survivors S make up for them: W'_S = W_S + W_P·H_PS·H_SS⁻¹.

    Computed as W_S − W_P·[(H⁻¹)_PP]⁻¹·(H⁻¹)_PS, the same thing (block inverse), because H⁻¹ is there for the scores,
    one solve gives both results, eliminating P from a positive definite matrix is stable without pivoting, and it
    costs O(n²·|P|) where a new inverse costs O(n³).

    Args:
        weight: W ``[out, n]``.
        inverse: H⁻¹ ``[n, n]``.
        removed: P, int64, any order.

    Returns:
        W'_S ``[out, n − |P|]`` and (H_SS)⁻¹, columns in their old order.
    """
    alive = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    alive[removed] = False
    cross = inverse[removed][:, alive]
    gain = torch.cholesky_solve(cross, _cholesky(inverse[removed][:, removed]))
    left = inverse[alive][:, alive] - cross.T @ gain
    return weight[:, alive] - weight[:, removed] @ gain, (left + left.T) / 2


def prune_heads(
    weight: Tensor, hessian: InverseHessian, num_remove: int, width: int, kind: HeadError = "slimgpt"
) -> PrunedLinear:
    """Greedy: remove the unit with the lowest ε (ties: lower index), compensate, score again, ``num_remove`` times.

    Args:
        weight: W ``[out, n]`` of the attention output, any floating dtype.
        hessian: of its inputs.
        num_remove: GQA groups to remove, 0 … n / width.
        width: columns of one group, r·d.
        kind: see ``head_errors``.

    Raises:
        NotPositiveDefiniteError: rounding broke H⁻¹; use float64.
    """
    return _prune(weight, hessian, width, [1] * num_remove, lambda w, inv: head_errors(w, inv, width, kind))


def prune_channels(weight: Tensor, hessian: InverseHessian, group_sizes: Sequence[int]) -> PrunedLinear:
    """The same loop over single columns; round i removes the ``group_sizes[i]`` lowest (``group_size_schedule``)."""
    return _prune(weight, hessian, 1, group_sizes, channel_errors)


def group_size_schedule(target: int, group_size: int | Literal["dynamic"] = "dynamic") -> list[int]:
    """How many MLP channels leave per round; the sum is exactly ``target``.

    A number: always so many. ``dynamic``, the released rule: b₀ = (target − 512)//2, then b ← (b − 512)//2, each
    clipped to 64 … 1024. Its lower limit is made for thousands of channels: a small MLP would lose everything in one
    round, without rescoring. At target = 512 the rule takes eight rounds of 64, so below that the limit is target/8,
    rounded up.
    """
    if group_size != "dynamic" and group_size < 1:
        raise ValueError(f"group_size {group_size} must be at least 1.")
    smallest = min(64, max(1, math.ceil(target / 8)))
    sizes: list[int] = []
    size, left = target, target
    while left > 0:
        size = min(1024, max(smallest, (size - 512) // 2)) if group_size == "dynamic" else group_size
        sizes.append(min(size, left))
        left -= sizes[-1]
    return sizes


def _prune(
    weight: Tensor,
    hessian: InverseHessian,
    width: int,
    group_sizes: Sequence[int],
    score: Callable[[Tensor, Tensor], Tensor],
) -> PrunedLinear:
    inverse = hessian.inverse
    weight = weight.detach().to(inverse.dtype)
    units = weight.shape[1] // width
    if sum(group_sizes) > units:
        raise ValueError(f"{sum(group_sizes)} of {units} units cannot be removed.")
    if group_sizes:  # a linear that loses nothing stays as it is, bit for bit
        weight = weight.masked_fill(hessian.dead, 0)
    kept = torch.arange(units, device=weight.device)
    errors = torch.zeros(units, dtype=weight.dtype, device=weight.device)
    offsets = torch.arange(width, device=weight.device)
    with full_precision(weight.device):
        for size in group_sizes:
            current = _finite(score(weight, inverse))
            victims = current.argsort(stable=True)[:size]
            errors[kept[victims]] = current[victims]
            weight, inverse = compensate(weight, inverse, (victims[:, None] * width + offsets).flatten())
            survives = torch.ones_like(kept, dtype=torch.bool)
            survives[victims] = False
            kept = kept[survives]
        if len(kept):
            errors[kept] = _finite(score(weight, inverse))
    return PrunedLinear(kept, weight, errors, hessian.damping)


def _finite(errors: Tensor) -> Tensor:
    if not bool((torch.isfinite(errors) & (errors >= 0)).all()):
        raise NotPositiveDefiniteError("pruning errors became negative or NaN: H⁻¹ lost its precision; use float64.")
    return errors


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        raise NotPositiveDefiniteError("a block of H⁻¹ is not positive definite: rounding; use float64.")
    return factor


def _spd_inverse(hessian: Tensor) -> Tensor | None:
    """Symmetric inverse, or None if the matrix is not positive definite to working precision.

    Scaled to a unit diagonal first, so channels of very different size do not pass for dependent ones. A singular
    matrix can slip through Cholesky by rounding: its reciprocal condition number (1-norm) is below the machine epsilon.
    """
    diagonal = hessian.diagonal()
    if bool((diagonal <= 0).any()):
        return None
    scale = diagonal.rsqrt()
    scale = scale[:, None] * scale
    unit = hessian * scale
    factor, failed = torch.linalg.cholesky_ex(unit)
    if bool(failed):
        return None
    inverse = torch.cholesky_inverse(factor)
    inverse = (inverse + inverse.T) / 2
    condition = float(unit.abs().sum(0).max() * inverse.abs().sum(0).max())
    if not condition * torch.finfo(hessian.dtype).eps < 1:
        return None
    return inverse * scale
