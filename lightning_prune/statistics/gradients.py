"""Gradients of the mean token loss over the calibration set, one weight matrix at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.statistics.token_statistic import TokenStatistic
from lightning_prune.surgery.anatomy import LayerAnatomy
from lightning_prune.surgery.groups import unit_sums

SampleTerm = Callable[[Tensor, Tensor], Tensor]
COLUMN_UNITS = ("output", "down")  # their units are input columns, those of the other projections output rows


class WeightGradient(TokenStatistic):
    """Σ over tokens of ∂loss/∂w, fp32, signed; divided by the number of tokens at the end.

    ``unit_terms`` sums, per prunable unit, a function of every single sample's gradient: it needs no weight-sized
    memory, however many samples there are.
    """

    gradient: Tensor
    unit_terms: Tensor
    not_finite: Tensor
    samples: Tensor

    def __init__(self, shape: torch.Size, num_units: int) -> None:
        super().__init__()
        self.add_matrix_state("gradient", shape)
        self.add_state("unit_terms", torch.zeros(num_units, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("not_finite", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, mean_gradient: Tensor, tokens: int, samples: int, terms: Tensor | None) -> None:
        """Add the gradient ``[out, in]`` of a mean over ``tokens`` tokens, and the units' terms of one sample."""
        self.gradient.add_(mean_gradient.float(), alpha=tokens)
        if terms is not None:
            self.unit_terms += terms.double()
        self.not_finite += (~torch.isfinite(mean_gradient)).sum()
        self.tokens += tokens
        self.samples += samples

    def compute(self) -> Tensor:
        """g, fp32 ``[out, in]``: gradient of the mean token loss over the whole set."""
        return self.gradient / self.tokens

    def mean_terms(self) -> Tensor:
        """Mean over samples of the units' terms, fp64 ``[units]``."""
        return self.unit_terms / self.samples


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
        self._handles: list[RemovableHandle] = []
        for view in layers:
            for role, linear in view.linears.items():
                units = view.num_channels if role in ("gate", "up", "down") else view.num_kv_heads
                statistic = WeightGradient(linear.weight.shape, units).to(linear.weight.device)
                self.sums[f"{view.index}_{role}"] = statistic
                linear.weight.requires_grad_(True)
                along = "columns" if role in COLUMN_UNITS else "rows"
                hook = self._consumer(statistic, units, along)
                self._handles.append(linear.weight.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        self._weights = [linear.weight for view in layers for linear in view.linears.values()]

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

    def of(self, layer: int) -> dict[str, WeightGradient]:
        """Statistics of one layer by role.

        Raises:
            FloatingPointError: a gradient was NaN or infinite.
        """
        found: dict[str, WeightGradient] = {
            name.split("_", 1)[1]: statistic  # type: ignore[misc]
            for name, statistic in self.sums.items()
            if name.startswith(f"{layer}_")
        }
        for role, statistic in found.items():
            bad = int(statistic.not_finite)
            if bad:
                raise FloatingPointError(
                    f"layer {layer}, {role} projection: {bad} gradient values overflowed (NaN or infinite). "
                    "Use --trainer.precision 32-true or bf16-true."
                )
        return found

    def _consumer(self, statistic: WeightGradient, units: int, along: str) -> Callable[[Tensor], None]:
        def consume(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient, terms = weight.grad.detach(), None
            if self.sample_term is not None:
                assert self.samples == 1, "per-sample terms need one sample per backward"
                with torch.no_grad():
                    terms = unit_sums(self.sample_term(weight.detach(), gradient.float()), units, along)  # type: ignore[arg-type]
            statistic.update(gradient, self.tokens, self.samples, terms)
            weight.grad = None

        return consume
