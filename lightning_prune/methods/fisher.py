"""Fisher importance of units (Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", section 4).

The square is taken per token instead of per sequence: a token is one draw of the fluctuations that removing a unit
causes, and there are as many more of them as a window is long.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.calibration.backward import BackwardPass
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Holding, Load
from lightning_prune.calibration.statistics.routed import RoutedSlopes
from lightning_prune.calibration.statistics.token_statistic import TokenStatistic
from lightning_prune.methods.experts import on_gradient, with_experts
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import OUTPUT_ROLE, Block
from lightning_prune.support.devices import widest


class MaskFisher(TokenStatistic):
    """Σ_t (∂L/∂m_t)² per unit of one projection, float64 ``[units]``, with L the summed token loss and m a factor on
    what the unit's columns read: ∂L/∂m_t = Σ over the columns of x_t · ∂L/∂x_t. ``tokens`` counts positions."""

    squares: Tensor

    def __init__(self, units: int) -> None:
        super().__init__(squares=(units,))
        self.units = units

    def update(self, x: Tensor, gradient: Tensor) -> None:
        """Add inputs x ``[B, L, in]`` and ∂L/∂x, of any dtype."""
        product = x.float() * gradient.float()
        slopes = product.unflatten(-1, (self.units, -1)).sum(-1) if self.units else product
        self.squares += slopes.square().sum(1).sum(0, dtype=widest(slopes.device))
        self.tokens += slopes.shape[:2].numel()

    def compute(self) -> Tensor:
        """Fisher importance I of every unit, float64 ``[units]``."""
        return self.squares / self.tokens


class FisherPass(BackwardPass):
    """I per GQA group and MLP channel. No weight takes a gradient, so it costs less than Taylor's pass."""

    name = "importance"

    def watch(self, view: LayerStructure) -> None:
        self.fisher: dict[Block, MaskFisher] = {}
        self._handles: list[RemovableHandle] = []
        for block in view.prunable:
            module = view.projection(block).module
            self.fisher[block] = MaskFisher(view.units(block)).to(module.weight.device)
            self._handles.append(module.register_forward_pre_hook(self._listener(self.fisher[block])))
        self.routed = None if view.experts is None else RoutedSlopes(view.experts).to(self.model.device)
        if self.routed is not None:
            self._handles.append(on_gradient(self.routed.experts[0].module, self.routed.update, inputs=3))

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        """Memory of a backward pass, and a projection's inputs and their gradient in fp32, and the product."""
        base, sums = super().holds(view, load), RoutedSlopes.bytes_of(view.experts)
        return replace(base, running=base.running + 12 * load.tokens * load.widest_input + sums)

    def conclude(self, view: LayerStructure) -> LayerResult:
        while self._handles:
            self._handles.pop().remove()
        for block, statistic in self.fisher.items():
            statistic.raise_if_not_finite(f"layer {view.index}, slopes at the input of {OUTPUT_ROLE[block]}")
        dense = LayerResult({block: statistic.reduced().reshape(-1) for block, statistic in self.fisher.items()})
        return with_experts(f"layer {view.index}", dense, self.routed, self.expert_score)

    @staticmethod
    def expert_score(sums: RoutedSlopes) -> Tensor:
        """Mean over all tokens of (∂L/∂m_k)², with m_k a factor on the channel's activation, ``[E, m]``."""
        return sums.products / sums.tokens

    def _listener(self, statistic: MaskFisher) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def listen(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, *rest = args
            x = x if x.requires_grad else x.detach().requires_grad_()  # nothing before it takes gradients in layer 0
            inputs = x.detach()
            x.register_hook(lambda gradient: statistic.update(inputs, gradient))
            return (x, *rest)

        return listen
