"""Gradients of the mean token loss over the calibration set, for the weights of one layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.calibration.statistics.token_statistic import TokenStatistic
from lightning_prune.models.families import LayerStructure


class WeightGradient(TokenStatistic):
    """Σ over tokens of ∂loss/∂w, fp32, signed; divided by the number of tokens at the end."""

    gradient: Tensor

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.add_matrix_state("gradient", *shape)

    def update(self, gradient: Tensor, tokens: int) -> None:
        """Add the gradient ``[out, in]`` of a sum over ``tokens`` tokens."""
        self.gradient += gradient
        self.tokens += tokens

    def compute(self) -> Tensor:
        """g, fp32 ``[out, in]``: gradient of the mean token loss over the whole set. Divides in place: once only."""
        return self.gradient.div_(self.tokens)


class LayerGradients(nn.Module):
    """Consumes a layer's weight gradients as soon as backward has made them, and frees them; until ``remove`` its
    projections are switched to ``requires_grad``."""

    def __init__(self, view: LayerStructure) -> None:
        super().__init__()
        self.view = view
        self.tokens = 0  # that the next backward's summed loss is taken over
        self.sums = nn.ModuleDict()
        self._roles: dict[Tensor, list[str]] = {}  # projections may share a parameter
        for role, linear in view.linears.items():
            self.sums[role] = WeightGradient(linear.weight.shape).to(linear.weight.device)
            self._roles.setdefault(linear.module.weight, []).append(role)
        for role, whole in view.experts.weights().items() if view.experts is not None else ():
            self.sums[f"experts_{role}"] = WeightGradient(whole.shape).to(whole.device)
            self._roles[whole] = [f"experts_{role}"]
        self._handles: list[RemovableHandle] = []
        for weight, roles in self._roles.items():
            weight.requires_grad_(True)
            self._handles.append(weight.register_post_accumulate_grad_hook(self._consumer(roles)))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Take the hooks off and freeze the weights again."""
        while self._handles:
            self._handles.pop().remove()
        for weight in self._roles:
            weight.requires_grad_(False)
            weight.grad = None
        self._roles.clear()

    def take(self, role: str) -> Tensor:
        """g of one projection, fp32, shaped like the weight; its accumulator is given up.

        Raises:
            FloatingPointError: a gradient was NaN or infinite.
        """
        statistic: WeightGradient = self.sums.pop(role)  # type: ignore[assignment]
        statistic.raise_if_not_finite(f"layer {self.view.index}, {role} projection")
        gradient = statistic.gradient
        statistic.give_up()
        return gradient

    def _consumer(self, roles: list[str]) -> Callable[[Tensor], None]:
        def consume(weight: Tensor) -> None:
            assert weight.grad is not None
            for role in roles:
                gradient = weight.grad.detach()
                part = self.view.linears[role].part(gradient) if role in self.view.linears else gradient
                self.sums[role].update(part, self.tokens)  # type: ignore[operator]
            weight.grad = None

        return consume
