"""Gradients of the mean token loss over the calibration set, for the weights of one layer."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.calibration.statistics.groups import unit_sums
from lightning_prune.calibration.statistics.token_statistic import TokenStatistic
from lightning_prune.models.families import LayerAnatomy

SampleTerm = Callable[[Tensor, Tensor], Tensor]
ROLES = ("query", "key", "value", "output", "gate", "up", "down")
COLUMN_UNITS = ("output", "down")  # their units are input columns, those of the other projections output rows


class WeightGradient(TokenStatistic):
    """Σ over tokens of ∂loss/∂w, fp32, signed; divided by the number of tokens at the end."""

    gradient: Tensor

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.add_matrix_state("gradient", shape)

    def update(self, gradient: Tensor, tokens: int) -> None:
        """Add the gradient ``[out, in]`` of a sum over ``tokens`` tokens."""
        self.gradient += gradient
        self.tokens += tokens

    def compute(self) -> Tensor:
        """g, fp32 ``[out, in]``: gradient of the mean token loss over the whole set. Divides in place: once only."""
        return self.gradient.div_(self.tokens)


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


class LayerGradients(nn.Module):
    """Consumes a layer's weight gradients as soon as backward has made them, and frees them.

    Args:
        view: one decoder layer; its projections are switched to ``requires_grad`` until ``remove``.
        sample_term: function of (weight, gradient of one sample's mean loss) to sum per unit; every backward must then
            hold exactly one sample.
    """

    def __init__(self, view: LayerAnatomy, sample_term: SampleTerm | None = None) -> None:
        super().__init__()
        self.view, self.sample_term = view, sample_term
        self.tokens = self.samples = 0
        self.sums = nn.ModuleDict()
        self.terms = nn.ModuleDict()
        self._handles: list[RemovableHandle] = []
        for role, linear in view.linears.items():
            self.sums[role] = WeightGradient(linear.weight.shape).to(linear.weight.device)
            if sample_term is not None:
                self.terms[role] = SampleTerms(self._units(role)).to(linear.weight.device)
        for weight, roles in self._roles_by_weight().items():
            weight.requires_grad_(True)
            self._handles.append(weight.register_post_accumulate_grad_hook(self._consumer(roles)))  # type: ignore[no-untyped-call]

    def expect(self, samples: int, tokens: int) -> None:
        """Say what the next backward's summed loss is taken over."""
        self.samples, self.tokens = samples, tokens

    def remove(self) -> None:
        """Take the hooks off and freeze the weights again."""
        while self._handles:
            self._handles.pop().remove()
        for weight in self._roles_by_weight():
            weight.requires_grad_(False)
            weight.grad = None

    def take(self, role: str) -> Tensor:
        """g of one projection, fp32, shaped like the weight; its accumulator is given up.

        Raises:
            FloatingPointError: a gradient was NaN or infinite.
        """
        statistic: WeightGradient = self.sums.pop(role)  # type: ignore[assignment]
        found = statistic.reduced()
        statistic.give_up()
        bad = int((~torch.isfinite(found)).sum())
        if bad:
            raise FloatingPointError(
                f"layer {self.view.index}, {role} projection: {bad} gradient values are NaN or infinite."
            )
        return found

    def terms_of(self, role: str) -> Tensor:
        """Mean sample terms per unit of one projection, fp64."""
        statistic: SampleTerms = self.terms[role]  # type: ignore[assignment]
        return statistic.reduced()

    def _roles_by_weight(self) -> dict[Tensor, list[str]]:
        """The layer's weights and the roles that each of them holds."""
        found: dict[Tensor, list[str]] = {}
        for role, linear in self.view.linears.items():
            found.setdefault(linear.module.weight, []).append(role)
        return found

    def _consumer(self, roles: list[str]) -> Callable[[Tensor], None]:
        def consume(weight: Tensor) -> None:
            assert weight.grad is not None
            for role in roles:
                part = self.view.linears[role].part
                self._take_up(role, part(weight.detach()), part(weight.grad.detach()))
            weight.grad = None

        return consume

    def _take_up(self, role: str, weight: Tensor, gradient: Tensor) -> None:
        self.sums[role].update(gradient, self.tokens)  # type: ignore[operator]
        if self.sample_term is not None:
            assert self.samples == 1, "per-sample terms need one sample per backward"
            with torch.no_grad():
                term = self.sample_term(weight, gradient.float() / self.tokens)
                self.terms[role].update(unit_sums(term, self._units(role), unit_axis(role)))  # type: ignore[operator]

    def _units(self, role: str) -> int:
        return self.view.num_channels if role in ("gate", "up", "down") else self.view.num_kv_heads


def unit_axis(role: str) -> Literal["rows", "columns"]:
    """Which axis of a projection's weight the prunable units divide."""
    return "columns" if role in COLUMN_UNITS else "rows"
