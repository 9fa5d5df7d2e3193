"""K-FAC importance: loss increase without a unit once the units that are kept compensate for it.

Symbols: W ``[d, n]`` the weight of o_proj or down_proj, x its input and g = ∂L/∂y the gradient at its output, L the
summed token loss. The curvature of L along W is taken for the Kronecker product of A = mean over tokens of x·xᵀ and F =
mean of g·gᵀ (Martens and Grosse 2015, K-FAC). When the columns b of W are removed, and the others become what the
curvature wants, L grows by

    I = tr(F · W_b · [(A⁻¹)_bb]⁻¹ · W_bᵀ)      times ½, which changes no ranking

(optimal brain surgeon with these factors: van der Ouderaa et al. 2024, "The LLM Surgeon"). With F = C·Cᵀ that is
SlimGPT's error of Cᵀ·W, so its solver does the work: units are removed one after the other until none is left, the
others compensate for them every time, and I is what a unit cost when it was removed. F makes costs of different layers
comparable, which SlimGPT's own, in each layer's units of output, are not.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.calibration.backward import BackwardPass
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Holding, Load, Step
from lightning_prune.calibration.statistics.gram import InputGram
from lightning_prune.calibration.statistics.routed import RoutedGrams
from lightning_prune.calibration.statistics.token_statistic import full_precision
from lightning_prune.methods.expert_passes import watch_backward, with_experts
from lightning_prune.methods.slimgpt_math import choose_dtype, inverse_hessian, prune_units, solve_bytes
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import OUTPUT_ROLE, Block
from lightning_prune.support.devices import widened, widest

DAMPING = 0.01  # of A and of F, times the mean of the diagonal
ROUNDS = 32  # in which MLP channels are removed; on the reference Llama 512 rounds, one channel each, chose no better


def compensated_costs(
    weight: Tensor,
    xtx: Tensor,
    gtg: Tensor,
    tokens: tuple[int, int],
    width: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """I of every unit as above, ``[n / width]``.

    Args:
        weight: W ``[d, n]``, any floating dtype.
        xtx: Σ x·xᵀ ``[n, n]`` over the tokens.
        gtg: Σ g·gᵀ ``[d, d]`` over the same tokens, or some of them.
        tokens: how many, of the first sum and of the second.
        width: columns of one unit; those of width 1 are removed in ``ROUNDS`` rounds, others one by one.
        dtype: of the computation, fp32 or float64.

    Raises:
        FloatingPointError: a factor holds NaN or infinite values, or A has no inverse.
    """
    units = weight.shape[1] // width
    curvature = gtg.to(dtype, copy=True).div_(tokens[1])
    mean = curvature.diagonal().mean()
    if not bool(torch.isfinite(curvature).all()):
        raise FloatingPointError("the gradients' second moment holds NaN or infinite values.")
    if not bool(mean > 0):  # nothing after it reaches the loss
        return weight.new_zeros(units, dtype=dtype)
    curvature.diagonal().add_(DAMPING * mean)
    with full_precision(weight.device):
        scaled = torch.linalg.cholesky(curvature).T @ weight.to(dtype)
    return removal_costs(scaled, xtx, tokens[0], width, dtype)


def removal_costs(scaled: Tensor, xtx: Tensor, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """I of every unit, ``[n / width]``, from ``scaled`` R ``[..., n]`` with RᵀR = WᵀFW; see ``compensated_costs``."""
    units = scaled.shape[1] // width
    hessian = inverse_hessian(xtx, 2 * tokens, DAMPING, dtype)  # its (2/N)·XᵀX is A for this N
    each = 1 if width > 1 else -(-units // ROUNDS)
    rounds = [min(each, units - gone) for gone in range(0, units, each)]
    return prune_units(scaled, hessian, rounds, width, "exact").errors


def kfac_of_experts(sums: RoutedGrams, dtype: torch.dtype) -> Tensor:
    """The same loss increase of every channel of experts, ``[E, m]``: A over the expert's tokens, F of the gradient at
    its output, which holds the router's weight, times the share of all tokens that the expert sees.

    Only Wᵀ·F·W enters, which is there already: its root takes the place of Cᵀ·W.

    Args:
        sums: complete.
        dtype: of the computation.
    """
    experts = sums.experts[0]
    costs = torch.zeros(experts.total, experts.width, dtype=torch.float64)
    for expert, count in enumerate(sums.counts.tolist()):
        if count:
            try:
                costs[expert] = widened(_costs_of_expert(sums, expert, dtype)).cpu() * (count / int(sums.tokens))
            except FloatingPointError as error:
                raise FloatingPointError(f"expert {expert}: {error}") from None
    return costs


def _costs_of_expert(sums: RoutedGrams, expert: int, dtype: torch.dtype) -> Tensor:
    weight = sums.experts[0].part("down", expert).to(dtype)
    count = int(sums.counts[expert])
    curvature = sums.slopes[expert].to(dtype, copy=True).div_(count)
    mean = float(sums.squares[expert]) / (count * len(weight))
    if not bool(torch.isfinite(curvature).all()):
        raise FloatingPointError("the gradients' second moment holds NaN or infinite values.")
    if not mean > 0:  # nothing after it reaches the loss
        return weight.new_zeros(weight.shape[1])
    with full_precision(weight.device):
        curvature.addmm_(weight.T, weight, alpha=DAMPING * mean)
        values, vectors = torch.linalg.eigh(curvature)  # it has no Cholesky factor where m exceeds the hidden size
        root = values.clamp_min(0).sqrt()[:, None] * vectors.T
    return removal_costs(root, sums.inputs[expert], count, 1, dtype)


class KFACPass(BackwardPass):
    """I per GQA group and MLP channel. No weight takes a gradient. A is of every sample; F, which has fewer numbers to
    be determined, of the first ``gradient_samples``."""

    name = "importance"

    def watch(self, view: LayerStructure) -> None:
        self.factors: dict[Block, tuple[InputGram, InputGram]] = {}
        self._handles: list[RemovableHandle] = []
        for block in view.prunable:
            module = view.projection(block).module
            d, n = view.projection(block).weight.shape
            inputs, gradients = (InputGram(size).to(self.model.device) for size in (n, d))
            self.factors[block] = inputs, gradients
            self._handles.append(module.register_forward_hook(_listener(inputs, gradients)))
        self.routed = None if view.experts is None else RoutedGrams(view.experts).to(self.model.device)
        if self.routed is not None:
            self._handles.append(watch_backward(self.routed))

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        """Also both factors of both projections in fp32, of experts' down projections too, a projection's inputs in
        fp32, and one solve at a time."""
        base = super().holds(view, load)
        shapes = [view.projection(block).weight.shape for block in view.prunable]
        factors = 4 * sum(d * d + n * n for d, n in shapes)
        if (experts := view.experts) is not None:
            shapes.append(torch.Size([experts.width] * 2))
            factors += RoutedGrams.bytes_of(experts)
        solve = max((solve_bytes(n, d, load.free, load.accelerated) for d, n in shapes), default=0)
        running = base.running + factors + 4 * load.tokens * load.widest_input
        return replace(base, running=running, finishing=factors + solve)

    def conclude(self, view: LayerStructure) -> LayerResult:
        while self._handles:
            self._handles.pop().remove()
        routed, dense = self.routed, LayerResult({block: self._costs(view, block) for block in view.prunable})
        if routed is None:
            return dense
        dtype = choose_dtype(
            routed.experts[0].width, self.setting.free_bytes(self.model.device), widest(self.model.device)
        )
        try:
            return with_experts(f"layer {view.index}", dense, routed, lambda sums: kfac_of_experts(sums, dtype))
        finally:
            routed.give_up()

    def cost(self, view: LayerStructure, step: Step) -> float:
        """Backward: run again, gradients of what passes, and both factors."""
        if step.phase == "forward":
            return 1.0
        shapes = [view.projection(block).weight.shape for block in view.prunable]
        factors = sum(self.share * d * d + n * n for d, n in shapes) / 2 / view.num_weights
        return 1.0 + self.share + factors

    def cost_to_finish(self, view: LayerStructure, step: Step) -> float:
        """About 2·n³ operations for A⁻¹ and what leaves, beside two for every weight of the layer and token."""
        if step.phase == "forward":
            return 0.0
        return sum(view.projection(block).in_features ** 3 for block in view.prunable) / view.num_weights

    def _costs(self, view: LayerStructure, block: Block) -> Tensor:
        """float64, so that scores of both solver precisions look alike."""
        linear, units = view.projection(block), view.units(block)
        inputs, gradients = self.factors.pop(block)
        if not units:
            return torch.zeros(0, dtype=torch.float64)
        xtx, gtg, tokens = inputs.matrix(), gradients.matrix(), (int(inputs.tokens), int(gradients.tokens))
        dtype = choose_dtype(len(xtx), self.setting.free_bytes(xtx.device), widest(xtx.device))
        try:
            width = linear.in_features // units
            return widened(compensated_costs(linear.weight, xtx, gtg, tokens, width, dtype))
        except FloatingPointError as error:
            raise FloatingPointError(f"layer {view.index}, {OUTPUT_ROLE[block]} projection: {error}") from None
        finally:
            inputs.give_up()
            gradients.give_up()


def _listener(inputs: InputGram, gradients: InputGram) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def listen(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.update(args[0])
        if not torch.is_grad_enabled():  # a sample that only A is of
            return
        if not output.requires_grad:  # in layer 0 nothing before it does
            output.requires_grad_(True)
        output.register_hook(gradients.update)

    return listen
