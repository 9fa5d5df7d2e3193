"""Gradients of the mean token loss over the calibration set, one weight matrix at a time."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.statistics.token_statistic import TokenStatistic
from lightning_prune.surgery.anatomy import LayerAnatomy
from lightning_prune.surgery.groups import unit_sums

SampleTerm = Callable[[Tensor, Tensor], Tensor]
ROLES = ("query", "key", "value", "output", "gate", "up", "down")
COLUMN_UNITS = ("output", "down")  # their units are input columns, those of the other projections output rows


class WeightGradient(TokenStatistic):
    """Σ over tokens of ∂loss/∂w, fp32, signed; divided by the number of tokens at the end."""

    gradient: Tensor

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.add_matrix_state("gradient", shape)

    def update(self, mean_gradient: Tensor, tokens: int) -> None:
        """Add the gradient ``[out, in]`` of a mean over ``tokens`` tokens."""
        self.gradient.add_(mean_gradient.float(), alpha=tokens)
        self.tokens += tokens

    def compute(self) -> Tensor:
        """g, fp32 ``[out, in]``: gradient of the mean token loss over the whole set."""
        return self.gradient / self.tokens


class SampleTerms(TokenStatistic):
    """Mean over samples of a function of each sample's gradient, summed per prunable unit.

    It needs no weight-sized memory, however many samples there are.
    """

    terms: Tensor
    samples: Tensor

    def __init__(self, num_units: int) -> None:
        super().__init__()
        self.add_state("terms", torch.zeros(num_units, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, terms: Tensor) -> None:
        """Add the units' terms ``[units]`` of one sample."""
        self.terms += terms.double()
        self.samples += 1

    def compute(self) -> Tensor:
        """Mean over samples, fp64 ``[units]``."""
        return self.terms / self.samples


class GradientSums(nn.Module):
    """Consumes every prunable weight's gradient as soon as backward has made it, and frees it.

    So beside the weights there is one fp32 accumulator per prunable weight and one transient gradient. Embeddings,
    norms and head take no gradient.

    Args:
        layers: anatomy of the model; its weights are switched to ``requires_grad`` until ``remove``.
        sample_term: function of (weight, gradient of one sample) to sum per unit; every backward must then hold
            exactly one sample.
    """

    def __init__(self, layers: Sequence[LayerAnatomy], sample_term: SampleTerm | None = None) -> None:
        super().__init__()
        self.sample_term = sample_term
        self.tokens = self.samples = 0
        self.sums = nn.ModuleDict()
        self.terms = nn.ModuleDict()
        self._handles: list[RemovableHandle] = []
        self._weights = [linear.weight for view in layers for linear in view.linears.values()]
        for view in layers:
            for role, linear in view.linears.items():
                name, weight = f"{view.index}_{role}", linear.weight
                self.sums[name] = WeightGradient(weight.shape).to(weight.device)
                if sample_term is not None:
                    self.terms[name] = SampleTerms(_units(view, role)).to(weight.device)
                weight.requires_grad_(True)
                hook = self._consumer(name, _units(view, role), "columns" if role in COLUMN_UNITS else "rows")
                self._handles.append(weight.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def expect(self, samples: int, tokens: int) -> None:
        """Say what the next backward's mean loss is taken over."""
        self.samples, self.tokens = samples, tokens

    def remove(self) -> None:
        """Take the hooks off and freeze the weights again."""
        while self._handles:
            self._handles.pop().remove()
        for weight in self._weights:
            weight.requires_grad_(False)
            weight.grad = None

    def of(self, layer: int) -> dict[str, Tensor]:
        """g of one layer by role, fp32, shaped like the weights.

        Raises:
            FloatingPointError: a gradient was NaN or infinite.
        """
        found = {}
        for role in ROLES:
            statistic: WeightGradient = self.sums[f"{layer}_{role}"]  # type: ignore[assignment]
            found[role] = statistic.reduced()
            bad = int((~torch.isfinite(found[role])).sum())
            if bad:
                raise FloatingPointError(
                    f"layer {layer}, {role} projection: {bad} gradient values overflowed (NaN or infinite)."
                )
        return found

    def terms_of(self, layer: int) -> dict[str, Tensor]:
        """Mean sample terms per unit of one layer by role, fp64."""
        statistics: dict[str, SampleTerms] = {role: self.terms[f"{layer}_{role}"] for role in ROLES}  # type: ignore[misc]
        return {role: statistic.reduced() for role, statistic in statistics.items()}

    def _consumer(self, name: str, units: int, along: Literal["rows", "columns"]) -> Callable[[Tensor], None]:
        def consume(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.detach()
            self.sums[name].update(gradient, self.tokens)  # type: ignore[operator]
            if self.sample_term is not None:
                assert self.samples == 1, "per-sample terms need one sample per backward"
                with torch.no_grad():
                    term = self.sample_term(weight.detach(), gradient.float())
                    self.terms[name].update(unit_sums(term, units, along))  # type: ignore[operator]
            weight.grad = None

        return consume


def _units(view: LayerAnatomy, role: str) -> int:
    return view.num_channels if role in ("gate", "up", "down") else view.num_kv_heads
