"""Sums over the tokens that a router sends to each of E experts, shared ones included.

The router's weight g multiplies an expert's output, so a token counts with g in what is measured of activations.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prune.calibration.statistics.token_statistic import TokenStatistic, full_precision
from lightning_prune.models.experts import Experts
from lightning_prune.support.devices import widest


class ExpertTokens(NamedTuple):
    """The tokens of one expert: rows ``[T]`` in the batch, x ``[T, D]``, g ``[T, 1]``, a ``[T, m]``, f(x) ``[T, D]``.
    All but the rows in fp32."""

    expert: int
    rows: Tensor
    x: Tensor
    gate: Tensor
    inner: Tensor
    output: Tensor


class RoutedTokens(TokenStatistic):
    """Number of tokens per expert, ``counts`` ``[E]`` float64, and the largest |f(x)_j|, ``peaks`` ``[E]``."""

    counts: Tensor
    peaks: Tensor

    def __init__(self, experts: Experts, **sums: tuple[int, ...]) -> None:
        super().__init__(**{name: (experts.total, *shape) for name, shape in {"counts": (), **sums}.items()})
        self.experts = [experts]  # in a list, so that its modules are not this one's
        self.register_buffer("peaks", torch.zeros(experts.total), persistent=False)

    @classmethod
    def bytes_of(cls, experts: Experts | None) -> int:
        """Bytes of the states and of the copies that torchmetrics keeps to reset them; 0 without experts."""
        if experts is None:
            return 0
        with torch.device("meta"):
            one = cls(experts)
        kept = [value for value in one._defaults.values() if isinstance(value, Tensor)]
        return sum(value.nbytes for value in (*kept, *(getattr(one, name) for name in one._defaults)))

    @torch.no_grad()
    def update(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """Add tokens x ``[T, D]`` with the experts ``[T, k]`` and weights g ``[T, k]`` that the router gave them."""
        for _ in self._tokens(hidden, index, weights):
            pass

    def _tokens(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Iterator[ExpertTokens]:
        """The tokens, counted, expert by expert."""
        experts = self.experts[0]
        self.tokens += len(hidden)
        for expert, rows, gate in experts.routed(index, weights):
            x = hidden[rows]
            inner = experts.inner(expert, x)
            output = experts.output(expert, inner).float()
            self.counts[expert] += len(rows)
            self.peaks[expert] = torch.maximum(self.peaks[expert], output.abs().max())
            yield ExpertTokens(expert, rows, x.float(), gate.float()[:, None], inner.float(), output)

    def reduced(self) -> Tensor:
        """Reduce the sums over all processes, and the peaks to the largest of any process."""
        if not self._summed and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.peaks, torch.distributed.ReduceOp.MAX)
        return super().reduced()

    def compute(self) -> Tensor:
        """One number per expert ``[E]``: finite where all that was summed is."""
        states: list[Tensor] = [getattr(self, name) for name in self._defaults if name != "tokens"]
        return self.peaks + sum(state.reshape(len(self.peaks), -1).sum(1) for state in states)

    def facts(self) -> dict[str, Any]:
        """Tokens and peaks of the routed experts, for ``LayerResult.facts``; call ``reduced`` before."""
        counts, peaks = (values[: self.experts[0].count].tolist() for values in (self.counts, self.peaks))
        return {"experts": {"tokens": [int(count) for count in counts], "peaks": peaks}}


class RoutedOutputs(RoutedTokens):
    """``RoutedTokens`` with the sums Σ ‖f(x)‖₂, Σ g·‖f(x)‖₂, Σ g²·x_j² and Σ g²·a_k², float64.

    ``norms`` and ``gated`` are ``[E]``, ``inputs`` ``[E, D]`` and ``inner`` ``[E, m]``.
    """

    norms: Tensor
    gated: Tensor
    inputs: Tensor
    inner: Tensor

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts, norms=(), gated=(), inputs=(experts.hidden,), inner=(experts.width,))

    @torch.no_grad()
    def update(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        kind = widest(hidden.device)
        for expert, _, x, gate, inner, output in self._tokens(hidden, index, weights):
            norm = output.norm(dim=1)
            self.norms[expert] += norm.sum(dtype=kind)
            self.gated[expert] += (gate[:, 0] * norm).sum(dtype=kind)
            self.inputs[expert] += (gate * x).square().sum(0, dtype=kind)
            self.inner[expert] += (gate * inner).square().sum(0, dtype=kind)


class RoutedSlopes(RoutedTokens):
    """How the loss moves with the channels of every expert, float64 ``[E, m]``.

    With δ = ∂L/∂y at the experts' summed output y and s_k = g·w_kᵀ·δ, the slope along channel k's output column w_k:
    ``inner`` Σ a_k², ``slopes`` Σ s_k² and ``products`` Σ (a_k·s_k)².
    """

    inner: Tensor
    slopes: Tensor
    products: Tensor

    def __init__(self, experts: Experts) -> None:
        channels = (experts.width,)
        super().__init__(experts, inner=channels, slopes=channels, products=channels)

    @torch.no_grad()
    def update(self, hidden: Tensor, index: Tensor, weights: Tensor, gradient: Tensor) -> None:  # type: ignore[override]
        """Add tokens, with δ ``[T, D]``."""
        kind, down = widest(hidden.device), partial(self.experts[0].part, "down")
        for expert, rows, _, gate, inner, _ in self._tokens(hidden, index, weights):
            slope = gate * (gradient[rows].float() @ down(expert).float())
            self.inner[expert] += inner.square().sum(0, dtype=kind)
            self.slopes[expert] += slope.square().sum(0, dtype=kind)
            self.products[expert] += (inner * slope).square().sum(0, dtype=kind)


class RoutedGrams(RoutedTokens):
    """Both factors of the curvature along every expert's down projection, fp32 ``[E, m, m]``.

    ``inputs`` Σ a·aᵀ and ``slopes`` Σ s·sᵀ = W_downᵀ·(Σ (g·δ)·(g·δ)ᵀ)·W_down; ``squares`` ``[E]`` Σ ‖g·δ‖². With a size
    r of every token, a / r takes the place of a, and r·δ that of δ.
    """

    squares: Tensor
    inputs: Tensor
    slopes: Tensor

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts, squares=())
        for name in ("inputs", "slopes"):
            self.add_matrix_state(name, experts.total, experts.width, experts.width)

    @torch.no_grad()
    def update(  # type: ignore[override]
        self, hidden: Tensor, index: Tensor, weights: Tensor, gradient: Tensor, size: Tensor | None = None
    ) -> None:
        """Add tokens, with δ ``[T, D]`` and r ``[T, 1]``."""
        kind, down = widest(hidden.device), partial(self.experts[0].part, "down")
        with full_precision(hidden.device):
            for expert, rows, _, gate, inner, _ in self._tokens(hidden, index, weights):
                delta = gate * gradient[rows].float()
                if size is not None:
                    delta, inner = delta * size[rows], inner / size[rows]
                slope = delta @ down(expert).float()
                self.squares[expert] += delta.square().sum(dtype=kind)
                # It is inverted, which makes its rounding larger. A GPU would take up to 64 times as long in float64.
                inner = inner.double() if inner.device.type == "cpu" else inner
                self.inputs[expert] += inner.T @ inner
                self.slopes[expert].addmm_(slope.T, slope)
