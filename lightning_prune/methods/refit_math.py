"""Least squares for what is kept of a projection: ridge regression towards the weight that was there.

For inputs X ``[T, n]`` of the kept columns and targets Y ``[T, d]``:

    W = argmin ‖X·Wᵀ − Y‖² + λ·Σ_j G_jj·‖W_j − W₀_j‖²  =  W₀ + (YᵀX − W₀·G)·(G + λ·diag(G))⁻¹,   G = XᵀX

Least squares on what a pruned layer reads is SlimGPT's refit (Ling et al. 2024, "SlimGPT: Layer-wise Structured Pruning
for Large Language Models", eq. 2–4) for any selection; λ is the damping of its Hessian, with W₀ as its centre and every
column pulled in proportion to its own input's size: with one pull for all, the mean of the diagonal, the few inputs of
a trained model that are thousands of times larger than the others would keep those from moving at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lightning_prune.calibration.statistics.gram import add_gram_, add_product_, mirror_upper_
from lightning_prune.support.devices import widest

# ``auto`` chooses from these, beside leaving the projection as it is.
DAMPINGS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DEFAULT_DAMPING = 1e-2  # where too few samples are there to hold some out


@dataclass
class NormalEquations:
    """G = XᵀX ``[n, n]`` and C = YᵀX ``[d, n]``, float64 or fp32, summed over tokens.

    Only the upper triangle of G is kept up until ``complete``. A batch's products are made in ``products``, fp32 as a
    rule: that is 1e-7 of G's diagonal, which every λ of ``DAMPINGS`` exceeds by far.
    """

    gram: Tensor
    cross: Tensor
    products: torch.dtype = torch.float32

    @classmethod
    def zeros(
        cls, n: int, d: int, dtype: torch.dtype, device: torch.device, damping: float | None = None
    ) -> "NormalEquations":
        """No tokens yet. ``damping``: the λ to come, where it is known; a very small one needs exact products."""
        gram, cross = (torch.zeros(rows, n, dtype=dtype, device=device) for rows in (n, d))
        return cls(gram, cross, torch.float32 if damping is None or damping >= DAMPINGS[0] else dtype)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add X ``[T, n]`` and Y ``[T, d]``."""
        exact = self.gram.dtype in (self.products, inputs.dtype)
        x, y = (values.to(self.gram.dtype if exact else self.products) for values in (inputs, targets))
        add_gram_(self.gram, x)
        add_product_(self.cross, y.T, x)

    def complete(self) -> None:
        """Fill G's lower triangle."""
        mirror_upper_(self.gram)


def equation_bytes(n: int, d: int, dtype: torch.dtype) -> int:
    """Most memory that sums and one solve take: G, its factor, a temporary, C and three matrices of its size."""
    return dtype.itemsize * (3 * n * n + 4 * d * n)


def ridge(equations: NormalEquations, old: Tensor, damping: float, rest: Tensor | None = None) -> Tensor:
    """W ``[d, n]`` as above, in the dtype of the equations.

    Args:
        equations: complete.
        old: W₀ ``[d, n]``.
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
    if int(failed):
        raise FloatingPointError("XᵀX is not positive definite; use more calibration tokens or a larger damping.")
    rest = cross - old @ gram if rest is None else rest
    return old + torch.cholesky_solve(rest.T, factor).T


def squared_error(inputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """‖X·Wᵀ − Y‖² for X ``[T, n]``, Y ``[T, d]``, W ``[d, n]``: a scalar in fp64, computed in X's dtype."""
    difference = torch.addmm(targets.to(inputs.dtype), inputs, weight.to(inputs.dtype).T, beta=-1)
    return difference.square().sum(dtype=widest(difference.device))


def choose_damping(
    equations: NormalEquations, old: Tensor, inputs: Tensor, wanted: Tensor, damping: float | None
) -> tuple[float, float, float]:
    """λ, and the error on held-out samples of the old weight and of the one with that λ. 0: leave it as it is.

    Args:
        equations: complete, without the held-out samples.
        old: W₀ ``[d, n]``.
        inputs, wanted: X ``[T, n]`` and Y ``[T, d]`` of the held-out samples of this process.
        damping: the only λ to try; None tries ``DAMPINGS``.
    """
    held = torch.tensor(len(inputs), device=inputs.device)
    sum_over_processes(held)
    if not held:
        return damping or DEFAULT_DAMPING, 0.0, 0.0
    rest = equations.cross - old @ equations.gram
    x, y = (values if values.dtype == old.dtype else values.float() for values in (inputs, wanted))

    @cache
    def error(candidate: float) -> float:
        error_sum = squared_error(x, y, ridge(equations, old, candidate, rest) if candidate else old)
        sum_over_processes(error_sum)
        return float(error_sum)

    best = lowest(error, DAMPINGS) if damping is None else damping
    best = min(0.0, best, key=error)
    return best, error(0.0), error(best)


def lowest(error: Callable[[float], float], candidates: Sequence[float]) -> float:
    """Where ``error`` is lowest, downhill from the middle: it falls while noise is damped and rises once the fit is, so
    about four of seven are tried."""
    at = len(candidates) // 2
    for step in (-1, 1):
        while 0 <= at + step < len(candidates) and error(candidates[at + step]) < error(candidates[at]):
            at += step
    return candidates[at]


def add_completed(equations: NormalEquations, inputs: Tensor, targets: Tensor) -> None:
    """Add the samples of every process to sums that are complete."""
    more = NormalEquations(torch.zeros_like(equations.gram), torch.zeros_like(equations.cross), equations.products)
    more.add(inputs, targets)
    more.complete()
    sum_over_processes(more.gram, more.cross)
    equations.gram += more.gram
    equations.cross += more.cross


def sum_over_processes(*tensors: Tensor) -> None:
    """Add up tensors over all processes, in place."""
    if torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
