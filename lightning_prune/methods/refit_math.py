"""Least squares for what is kept of a projection: SlimGPT's refit (Ling et al. 2024, eq. 2–4) for any selection."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lightning_prune.calibration.statistics.gram import add_gram_, add_product_, mirror_upper_
from lightning_prune.calibration.statistics.token_statistic import full_precision
from lightning_prune.support.devices import widest

# ``auto`` chooses from these, or does not change the projection.
DAMPINGS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DEFAULT_DAMPING = 1e-2  # where too few samples are there to hold some out
PROBES = 128  # about how many outputs λ is chosen by


@dataclass
class NormalEquations:
    """G = XᵀX ``[n, n]``, its upper triangle alone until ``complete``, and C = YᵀX ``[d, n]``, float64 or fp32.
    A batch's products are fp32 as a rule: that is 1e-7 of G's diagonal, which every λ of ``DAMPINGS`` exceeds."""

    gram: Tensor
    cross: Tensor
    products: torch.dtype = torch.float32

    @classmethod
    def zeros(
        cls, n: int, d: int, dtype: torch.dtype, device: torch.device, damping: float | None = None
    ) -> "NormalEquations":
        """No tokens yet. A very small λ to come, where it is known, needs exact products."""
        gram, cross = (torch.zeros(rows, n, dtype=dtype, device=device) for rows in (n, d))
        return cls(gram, cross, torch.float32 if damping is None or damping >= DAMPINGS[0] else dtype)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add the products of X ``[T, n]`` and Y ``[T, d]`` to the sums."""
        exact = self.gram.dtype in (self.products, inputs.dtype)
        x, y = (values.to(self.gram.dtype if exact else self.products) for values in (inputs, targets))
        add_gram_(self.gram, x)
        add_product_(self.cross, y.T, x)

    def complete(self) -> None:
        """Fill G's lower triangle."""
        mirror_upper_(self.gram)


def equation_bytes(n: int, d: int, dtype: torch.dtype) -> int:
    """Peak memory of sums and one solve, in bytes: G, its factor, a temporary, C and three matrices of its size."""
    return dtype.itemsize * (3 * n * n + 4 * d * n)


def ridge(equations: NormalEquations, old: Tensor, damping: float, rest: Tensor | None = None) -> Tensor:
    """W = argmin ‖X·Wᵀ − Y‖² + λ·Σ_j G_jj·‖W_j − W₀_j‖²  =  W₀ + (YᵀX − W₀·G)·(G + λ·diag(G))⁻¹, ``[d, n]``.

    Every column is pulled in proportion to its own input's size: with one pull for all, the mean of the diagonal, the
    few inputs that are thousands of times larger than the others would keep those from moving at all.

    Args:
        equations: complete.
        old: W₀ ``[d, n]``; W has the dtype of the equations.
        damping: λ > 0. Inputs that never move have a zero row in G, and keep their column of W₀.
        rest: YᵀX − W₀·G, where it is known.

    Raises:
        FloatingPointError: G or C holds NaN or infinite values, or G + λ·diag(G) is not positive definite.
    """
    gram, cross = equations.gram, equations.cross
    if not bool(torch.isfinite(gram).all() and torch.isfinite(cross).all()):
        raise FloatingPointError("the normal equations hold NaN or infinite values.")
    old = old.to(gram.dtype)
    damped = gram.clone()
    pull = gram.diagonal()
    damped.diagonal().add_(torch.where(pull == 0, 1.0, damping * pull))
    factor, failed = torch.linalg.cholesky_ex(damped)
    del damped  # the solve copies the factor
    if int(failed):
        raise FloatingPointError("XᵀX is not positive definite; use more calibration tokens or a larger damping.")
    rest = cross - old @ gram if rest is None else rest
    return old + torch.cholesky_solve(rest.T, factor).T


def squared_error(inputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """‖X·Wᵀ − Y‖² for X ``[T, n]``, Y ``[T, d]``, W ``[d, n]``: a scalar in fp64, computed in X's dtype."""
    difference = torch.addmm(targets.to(inputs.dtype), inputs, weight.to(inputs.dtype).T, beta=-1)
    return difference.square().sum(dtype=widest(difference.device))


@dataclass(frozen=True)
class Fit:
    """W ``[d, n]``; λ, 0 where the weight is left as it is; the squared error on held-out samples of the old weight and
    of the one that this λ gives without them."""

    weight: Tensor
    damping: float
    before: float
    after: float


def fit(equations: NormalEquations, old: Tensor, held: list[tuple[Tensor, Tensor]], damping: float | None) -> Fit:
    """W on all samples, with the λ that is best on the held-out ones; all processes together.

    Args:
        equations: of this process, without the held-out samples; used up.
        old: W₀ ``[d, n]``, in the dtype of the equations.
        held: X ``[T, n]`` and Y ``[T, d]`` of the held-out samples of this process.
        damping: the only λ to try; None tries ``DAMPINGS``.

    Raises:
        FloatingPointError: as ``ridge``.
    """
    sum_over_processes(equations.gram, equations.cross)
    equations.complete()
    inputs = torch.cat([x for x, _ in held] or [old.new_zeros(0, old.shape[1])]).to(old.device)
    wanted = torch.cat([y for _, y in held] or [old.new_zeros(0, old.shape[0])]).to(old.device)
    count = torch.tensor(len(inputs), device=old.device)
    sum_over_processes(count)
    with full_precision(old.device):
        rest = equations.cross - old @ equations.gram
        x, y = (values if values.dtype == old.dtype else values.float() for values in (inputs, wanted))

        def error(candidate: float) -> float:
            error_sum = squared_error(x, y, ridge(equations, old, candidate, rest) if candidate else old)
            sum_over_processes(error_sum)
            return float(error_sum)

        best, before, after = damping or DEFAULT_DAMPING, 0.0, 0.0
        if count:
            best = choose_damping(equations, old, rest, x, y) if damping is None else damping
            before, after = error(0.0), error(best)
            if before <= after:
                return Fit(old, 0.0, before, before)
        more = NormalEquations(torch.zeros_like(equations.gram), torch.zeros_like(equations.cross), equations.products)
        more.add(inputs, wanted)
        more.complete()
        sum_over_processes(more.gram, more.cross)
        equations.gram += more.gram
        equations.cross += more.cross
        del more
        return Fit(ridge(equations, old, best), best, before, after)


def choose_damping(equations: NormalEquations, old: Tensor, rest: Tensor, inputs: Tensor, targets: Tensor) -> float:
    """λ of ``DAMPINGS`` for which X ``[T, n]`` and Y ``[T, d]``, held out by this process, are met best.

    Rows of W are solved apart from each other, so some of them say what all of them would; and λ, in steps of about
    three, needs no float64. Both leave the two solves that follow as the cost: those of W itself and of its error.

    Args:
        equations: complete, without the held-out samples.
        old: W₀ ``[d, n]``.
        rest: YᵀX − W₀·G ``[d, n]``.
        inputs: X.
        targets: Y.
    """
    some = slice(None, None, -(-len(old) // PROBES))
    trial = NormalEquations(equations.gram.float(), equations.cross[some].float())
    weight, missing, wanted = old[some].float(), rest[some].float(), targets[:, some]

    @cache
    def error(candidate: float) -> float:
        try:
            tried = ridge(trial, weight, candidate, missing)
        except FloatingPointError:  # fp32 is too short for so small a λ; where sums are not finite, float64 says so
            return float("inf")
        error_sum = squared_error(inputs, wanted, tried)
        sum_over_processes(error_sum)
        return float(error_sum)

    return lowest(error, DAMPINGS)


def lowest(error: Callable[[float], float], candidates: Sequence[float]) -> float:
    """The candidate with the lowest ``error``, searched downhill from the middle: the error falls while noise is damped
    and rises once the fit is, so about four of seven are tried."""
    at = len(candidates) // 2
    for step in (-1, 1):
        while 0 <= at + step < len(candidates) and error(candidates[at + step]) < error(candidates[at]):
            at += step
    return candidates[at]


def sum_over_processes(*tensors: Tensor) -> None:
    """Add up tensors over all processes, in place."""
    if torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
