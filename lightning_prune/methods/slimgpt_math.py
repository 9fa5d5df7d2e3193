"""SlimGPT (Ling et al., 2024): which input columns of one linear to remove, and how the others compensate for it.

W ``[out, n]`` is the weight of o or down, X ``[tokens, n]`` its inputs, H = (2/N)·XᵀX + λ·mean(diag)·I, ε the rise of
tr(ΔW·H·ΔWᵀ) = (2/N)·‖ΔW·Xᵀ‖². One n × n matrix beside XᵀX becomes H, its factor, H⁻¹ and the inverse of what is left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_prune.calibration.statistics.gram import mirror_upper_
from lightning_prune.calibration.statistics.token_statistic import full_precision
from lightning_prune.methods.columns import columns_of

HeadError = Literal["slimgpt", "exact"]
MAX_DAMPING = 1.0
CHUNK = 2**21  # elements of a temporary: 16 MB in float64
UPDATE_ROWS = 512  # the rows of H⁻¹ that one matrix product updates, up to the diagonal
PACK_BELOW = 0.85  # share of live columns below which they move together: moving costs as much as a small update


@dataclass
class InverseHessian:
    """H⁻¹ ``[n, n]`` fp32 or float64, gone once it was used; ``dead``: bool ``[n]``, inputs that were 0 on every token;
    ``damping``: the λ that was used."""

    inverse: Tensor
    dead: Tensor
    damping: float


@dataclass(frozen=True)
class PrunedLinear:
    """Units ``kept``, int64, ascending; their ``weight`` ``[out, kept·width]``, compensated, in the dtype of H⁻¹;
    ``errors`` ``[units]``: ε when the unit was removed, for a kept one after the last removal."""

    kept: Tensor
    weight: Tensor
    errors: Tensor


def solver_bytes(n: int, dtype: torch.dtype) -> int:
    """Peak memory, beside XᵀX, of inverting and pruning a weight of up to n rows: two n × n matrices (CUDA inverts
    out of place), the columns removed in one round, and chunks."""
    return dtype.itemsize * (2 * n * n + 1024 * n + 4 * CHUNK)


def choose_dtype(n: int, free_bytes: int, widest: torch.dtype = torch.float64) -> torch.dtype:
    """``widest`` of the device where ``solver_bytes`` of float64 are free there, else fp32."""
    return widest if solver_bytes(n, torch.float64) <= free_bytes else torch.float32


def solve_bytes(n: int, rows: int, free_bytes: int, accelerated: bool) -> int:
    """Memory of XᵀX, of inverting it and of pruning a weight ``[rows, n]``. XᵀX is freed in between; an accelerator
    needs a second matrix to invert."""
    size = choose_dtype(n, free_bytes - 4 * n * n).itemsize
    inverting = 4 * n * n + size * n * n * (2 if accelerated else 1)
    return max(inverting, size * (n * n + rows * n + 1024 * n)) + 2 * size * CHUNK


def inverse_hessian(
    xtx: Tensor, num_samples: int, damping: float = 0.01, dtype: torch.dtype = torch.float64
) -> InverseHessian:
    """H⁻¹ at the smallest of λ, 10·λ, 100·λ … ≤ 1 that makes H positive definite (for λ = 0: 0, 0.001, 0.01 …).

    Args:
        xtx: XᵀX ``[n, n]``, fp32 or float64; only read. Inputs that are 0 get a diagonal of 1 before its mean is taken.
        num_samples: N, the calibration sequences. It cancels from every result but for that 1.
        damping: λ.
        dtype: of H⁻¹, fp32 or float64.

    Raises:
        FloatingPointError: XᵀX holds NaN or inf, or no such λ makes H positive definite.
    """
    if not all(bool(torch.isfinite(xtx[rows]).all()) for rows in _chunks(len(xtx), len(xtx))):
        raise FloatingPointError("XᵀX holds NaN or infinite values.")
    used = damping
    while True:
        hessian = xtx.to(dtype, copy=True, memory_format=torch.contiguous_format).mul_(2 / num_samples)
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1
        diagonal += used * diagonal.mean()
        with full_precision(xtx.device):
            inverted = _invert_(hessian)
        if inverted:
            return InverseHessian(hessian, dead, used)
        del hessian, diagonal  # before the next one is built
        following = 10 * max(used, 1e-4)
        if following > MAX_DAMPING * (1 + 1e-9):
            raise FloatingPointError(
                f"the Hessian is not positive definite, neither at damping {damping:g} nor at {used:g}. "
                "Use more calibration tokens than input channels, or a larger damping."
            )
        used = following


def channel_errors(weight: Tensor, inverse: Tensor) -> Tensor:
    """ε_j = ‖W_:,j‖² / (H⁻¹)_jj ``[n]``: optimal brain surgeon's error of a column over all rows, no ½."""
    return _column_squares(weight) / inverse.diagonal()


def head_errors(weight: Tensor, inverse: Tensor, width: int, kind: HeadError = "slimgpt") -> Tensor:
    """ε of each unit of ``width`` contiguous columns b, ``[n / width]``, with A = (H⁻¹)_bb = C·Cᵀ.

    ``slimgpt``: Σ_j ‖W_:,j‖² / C_jj², the paper's grouped Cholesky: the unit's earlier columns are removed, but not yet
    compensated for. ``exact``: tr(W_b·A⁻¹·W_bᵀ), the true joint error.
    """
    units = weight.shape[1] // width
    blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    factor = _cholesky(blocks)
    if kind == "slimgpt":
        squares = _column_squares(weight).view(units, width)
        return (squares / factor.diagonal(dim1=1, dim2=2).square()).sum(1)
    errors = weight.new_zeros(units)
    for rows in _chunks(len(weight), weight.shape[1]):
        columns = weight[rows].T.reshape(units, width, -1)
        errors += torch.linalg.solve_triangular(factor, columns, upper=False).square().sum((1, 2))
    return errors


def compensate_(weight: Tensor, inverse: Tensor, removed: Tensor) -> None:
    """Remove columns P and let the others, S, compensate for them, in place: W'_S = W_S + W_P·H_PS·H_SS⁻¹, W'_P = 0.

    Computed as W_S − W_P·[(H⁻¹)_PP]⁻¹·(H⁻¹)_PS, the same thing (block inverse): that is stable without pivoting, and
    costs O(n²·|P|) where a new inverse costs O(n³). Updating one triangle alone halves the work, and a matrix of which
    half is stored cannot lose its symmetry.

    Args:
        weight: W ``[out, n]``, contiguous; overwritten.
        inverse: H⁻¹ ``[n, n]``, of which only the lower triangle is read. Its lower triangle becomes (H_SS)⁻¹ in S and
            the identity in P; the upper one is undefined.
        removed: P, int64, distinct, any order.

    Raises:
        FloatingPointError: (H⁻¹)_PP is not positive definite, by rounding.
    """
    removed = removed.sort().values
    columns = torch.arange(weight.shape[1], device=weight.device)
    factor = _cholesky(inverse[removed[:, None], removed])  # C·Cᵀ = (H⁻¹)_PP
    panel = inverse.new_empty(len(removed), len(columns))  # C⁻¹·(H⁻¹)_P,:
    for part in _chunks(len(columns), len(removed)):
        left, below = inverse[removed, part], inverse[part].index_select(1, removed).T
        cross = torch.where(columns[part] <= removed[:, None], left, below)
        panel[:, part] = torch.linalg.solve_triangular(factor, cross, upper=False)
    gain = torch.linalg.solve_triangular(factor, weight[:, removed].T, upper=False)
    weight.addmm_(gain.T, panel, alpha=-1).index_fill_(1, removed, 0)
    for start in range(0, len(columns), UPDATE_ROWS):
        stop = min(start + UPDATE_ROWS, len(columns))
        inverse[start:stop, :stop].addmm_(panel[:, start:stop].T, panel[:, :stop], alpha=-1)
    inverse.index_fill_(0, removed, 0).index_fill_(1, removed, 0)
    inverse.diagonal()[removed] = 1


def prune_units(
    weight: Tensor,
    hessian: InverseHessian,
    rounds: Sequence[int],
    width: int = 1,
    kind: HeadError = "slimgpt",
    on_round: Callable[[float], None] = lambda share: None,
) -> PrunedLinear:
    """In every round remove the ``rounds[i]`` units with the lowest ε (ties: lower index), compensate, score again.

    Args:
        weight: W ``[out, n]`` of o or down, any floating dtype; it is not changed.
        hessian: of its inputs; used up.
        rounds: together 0 … n / width units.
        width: columns of one unit: one for a channel, r·d for a GQA group.
        kind: see ``head_errors``; a unit of one column has ``channel_errors``.
        on_round: called after every round with its share of all the units to remove.

    Raises:
        FloatingPointError: rounding broke H⁻¹; use float64.
    """

    def score() -> Tensor:
        errors = channel_errors(weight, inverse) if width == 1 else head_errors(weight, inverse, width, kind)
        if not bool((torch.isfinite(errors) & (errors >= 0)).all()):
            raise FloatingPointError("pruning errors became negative or NaN: H⁻¹ lost its precision; use float64.")
        return errors

    units, total, removed = weight.shape[1] // width, sum(rounds), 0
    inverse = hessian.inverse
    del hessian.inverse
    weight = weight.detach()
    if rounds:
        weight = weight.to(inverse.dtype, copy=True, memory_format=torch.contiguous_format)
        weight.masked_fill_(hessian.dead, 0)
    else:  # a linear that loses nothing is not changed, bit for bit
        weight = weight.to(inverse.dtype)
    unit = torch.arange(units, device=weight.device)  # which unit is where; removed ones stay until the next move
    alive = torch.ones_like(unit, dtype=torch.bool)
    errors = torch.zeros(units, dtype=weight.dtype, device=weight.device)
    with full_precision(weight.device):
        for size in rounds:
            current = score().masked_fill(~alive, torch.inf)
            victims = current.argsort(stable=True)[:size]
            errors[unit[victims]] = current[victims]
            alive[victims] = False
            compensate_(weight, inverse, columns_of(victims, width))
            removed += size
            if removed == total or units - removed < PACK_BELOW * len(unit):
                columns = columns_of(alive.nonzero().flatten(), width)
                weight, inverse = _packed(weight, None, columns), _packed(inverse, columns, columns)
                unit = unit[alive]
                alive = torch.ones_like(unit, dtype=torch.bool)
            on_round(size / total)
        if len(unit):
            errors[unit] = score()
    return PrunedLinear(unit, weight, errors)


def group_size_schedule(target: int, group_size: int | Literal["dynamic"] = "dynamic") -> list[int]:
    """Numbers of MLP channels to remove per round, together ``target``. ``dynamic``, the released rule: b₀ = (target −
    512)//2, then b ← (b − 512)//2, each clipped to 64 … 1024. Fewer at once measured worse (docs/methods/slimgpt.md).
    """
    sizes: list[int] = []
    size, left = target, target
    while left > 0:
        size = min(1024, max(64, (size - 512) // 2)) if group_size == "dynamic" else group_size
        sizes.append(min(size, left))
        left -= sizes[-1]
    return sizes


def _packed(matrix: Tensor, rows: Tensor | None, columns: Tensor) -> Tensor:
    """These rows (None: all) and columns, ascending, as a contiguous matrix at the front of the same memory: no row
    moves backwards, so none is overwritten before it was read."""
    flat, width = matrix.view(-1), len(columns)
    count = len(matrix) if rows is None else len(rows)
    for part in _chunks(count, matrix.shape[1]):
        source = matrix[part if rows is None else rows[part]]
        flat[part.start * width : part.stop * width] = source.index_select(1, columns).view(-1)
    return flat[: count * width].view(count, width)


def _chunks(count: int, width: int) -> list[slice]:
    """Slices of the rows 0 … count, of about ``CHUNK`` elements each, where a row has ``width`` elements."""
    step = max(1, CHUNK // max(1, width))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _column_squares(weight: Tensor) -> Tensor:
    """Squared norm of every column j, ‖W_:,j‖², ``[n]``."""
    total = weight.new_zeros(weight.shape[1])
    for rows in _chunks(len(weight), weight.shape[1]):
        total += weight[rows].square().sum(0)
    return total


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        raise FloatingPointError("a block of H⁻¹ is not positive definite: rounding; use float64.")
    return factor


def _invert_(hessian: Tensor) -> bool:
    """Overwrite with the symmetric inverse; False if H is not positive definite to working precision.

    Scaled to a unit diagonal first, so channels of very different size do not pass for dependent ones. A singular
    matrix can slip through Cholesky by rounding: its reciprocal condition number (1-norm) is below the machine epsilon.
    """
    diagonal = hessian.diagonal()
    if bool((diagonal <= 0).any()):
        return False
    scale = diagonal.rsqrt()
    _scale_(hessian, scale)
    norm = _one_norm(hessian)
    columns = hessian.mT  # LAPACK's order, so that both steps work in place
    _, failed = torch.linalg.cholesky_ex(
        columns, out=(columns, torch.empty((), dtype=torch.int32, device=scale.device))
    )
    if bool(failed):
        return False
    torch.cholesky_inverse(columns, out=columns)
    mirror_upper_(hessian)
    condition = norm * _one_norm(hessian)
    if not condition * torch.finfo(hessian.dtype).eps < 1:
        return False
    _scale_(hessian, scale)
    return True


def _scale_(matrix: Tensor, scale: Tensor) -> None:
    """Rows and columns times ``scale``; the product of the factors comes first, which keeps exact symmetry."""
    for rows in _chunks(len(matrix), len(matrix)):
        matrix[rows] *= scale[rows, None] * scale


def _one_norm(symmetric: Tensor) -> float:
    """Largest sum of magnitudes of a row, which is that of a column."""
    return max(float(symmetric[rows].abs().sum(1).max()) for rows in _chunks(len(symmetric), len(symmetric)))
