"""K-FAC importance: loss increase without a unit once the units that are kept compensate for it.

The curvature of the loss along W is taken for the Kronecker product of A and F, the second moments of a projection's
inputs and of the gradient at its output (Martens and Grosse 2015, K-FAC; van der Ouderaa et al. 2024, "The LLM
Surgeon"). F makes costs of different layers comparable, which SlimGPT's own, in each layer's units of output, are not.

Where a norm follows the block, it divides every token's output by its size r. Some tokens have outputs a thousand times
smaller than others (the first ones in Gemma 3), so gradients g as much larger, and F would be theirs alone. There A and
F are of x / r and r·g, whose product is that of x and g: of the projection's output after the division.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_prune.calibration.backward import BackwardPass
from lightning_prune.calibration.hooks import Hooks
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import ForwardPass, Holding, Load, Step
from lightning_prune.calibration.statistics.gram import InputGram
from lightning_prune.calibration.statistics.routed import RoutedGrams
from lightning_prune.calibration.statistics.token_statistic import full_precision
from lightning_prune.methods.columns import named
from lightning_prune.methods.experts import on_gradient, with_experts
from lightning_prune.methods.slimgpt_math import InverseHessian, choose_dtype, inverse_hessian, prune_units, solve_bytes
from lightning_prune.models.families import BlockStructure, LayerStructure
from lightning_prune.models.vocabulary import OUTPUT_ROLE, Block
from lightning_prune.support.devices import widened, widest

DAMPING = 0.01  # of A and of F, times the mean of the diagonal
ROUNDS = 32  # in which MLP channels are removed; on the reference Llama 512 rounds, one channel each, chose no better


def token_sizes(block: BlockStructure, outputs: Tensor) -> Tensor | None:
    """r = √(mean_j y_j² + ε) of what a block's projection or experts output, y ``[..., D]``, for the norm that follows:
    fp32 ``[..., 1]``; None where no norm follows."""
    norm: Any = block.exit
    if norm is None:
        return None
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return torch.sqrt(outputs.detach().float().square().mean(-1, keepdim=True) + epsilon)


def inverse_moment(xtx: Tensor, tokens: int, dtype: torch.dtype = torch.float64) -> InverseHessian:
    """A⁻¹ from Σ x·xᵀ ``[n, n]`` over so many tokens, damped; ``dtype``: of the computation, fp32 or float64.

    Raises:
        FloatingPointError: the sums hold NaN or infinite values, or A has no inverse.
    """
    return inverse_hessian(xtx, 2 * tokens, DAMPING, dtype)  # its (2/N)·XᵀX is A for this N


def compensated_costs(weight: Tensor, inverse: InverseHessian, gtg: Tensor, tokens: int, width: int) -> Tensor:
    """I of every unit b, ``[n / width]``: what the loss grows by without it, once the others compensate.

    I = tr(F · W_b · [(A⁻¹)_bb]⁻¹ · W_bᵀ), times ½, which changes no ranking. With F = C·Cᵀ that is SlimGPT's error of
    Cᵀ·W, so its solver removes units one after the other until none is left; I is what a unit cost at its turn.

    Args:
        weight: W ``[d, n]``, any floating dtype.
        inverse: A⁻¹ ``[n, n]``, in the dtype of the computation; used up.
        gtg: Σ g·gᵀ ``[d, d]`` over the tokens of A, or some of them.
        tokens: how many.
        width: columns of one unit; those of width 1 are removed in ``ROUNDS`` rounds, others one by one.

    Raises:
        FloatingPointError: F holds NaN or infinite values.
    """
    units, dtype = weight.shape[1] // width, inverse.inverse.dtype
    curvature = gtg.to(dtype, copy=True).div_(tokens)
    mean = curvature.diagonal().mean()
    if not bool(torch.isfinite(curvature).all()):
        raise FloatingPointError("the gradients' second moment holds NaN or infinite values.")
    if not bool(mean > 0):  # nothing after it reaches the loss
        return weight.new_zeros(units, dtype=dtype)
    curvature.diagonal().add_(DAMPING * mean)
    with full_precision(weight.device):
        scaled = torch.linalg.cholesky(curvature).T @ weight.to(dtype)
    return _removal_costs(scaled, inverse, width)


def _removal_costs(scaled: Tensor, inverse: InverseHessian, width: int) -> Tensor:
    """I of every unit, ``[n / width]``, from ``scaled`` R ``[..., n]`` with RᵀR = WᵀFW; see ``compensated_costs``."""
    units = scaled.shape[1] // width
    each = 1 if width > 1 else -(-units // ROUNDS)
    rounds = [min(each, units - gone) for gone in range(0, units, each)]
    return prune_units(scaled, inverse, rounds, width, "exact").errors


def kfac_of_experts(sums: RoutedGrams, dtype: torch.dtype) -> Tensor:
    """The same loss increase of every channel of experts, ``[E, m]``: A over the expert's tokens, F of the gradient at
    its output, which holds the router's weight, times the share of all tokens that the expert sees.

    Only Wᵀ·F·W enters, which is there already: its root takes the place of Cᵀ·W. ``dtype`` is that of the computation.
    """
    experts = sums.experts[0]
    costs = torch.zeros(experts.total, experts.width, dtype=torch.float64)
    for expert, count in enumerate(sums.counts.tolist()):
        if count:
            with named(f"expert {expert}"):
                costs[expert] = widened(_costs_of_expert(sums, expert, dtype)).cpu() * (count / int(sums.tokens))
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
    return _removal_costs(root, inverse_moment(sums.inputs[expert], count, dtype), 1)


class GradientPass(BackwardPass):
    """F of every projection that writes to the residual stream, and all of the importance of experts. No weight takes a
    gradient. F has fewer numbers to be determined than A: ``num_samples`` may be fewer than those of ``KFACPass``."""

    name = "gradients"

    def watch(self, view: LayerStructure) -> None:
        self.factors: dict[str, InputGram] = {}
        self._handles: list[RemovableHandle] = []
        for block in view.prunable:
            gram = InputGram(view.projection(block).weight.shape[0]).to(self.model.device)
            self.factors[OUTPUT_ROLE[block]] = gram
            module, sizes = view.projection(block).module, partial(token_sizes, view.parts[block])
            self._handles.append(on_gradient(module, partial(_add_gradient, gram), sizes=sizes))
        self.routed = None if view.experts is None else RoutedGrams(view.experts).to(self.model.device)
        if self.routed is not None:
            module = self.routed.experts[0].module
            (part,) = (part for part in view.parts.values() if part.experts is not None)
            self._handles.append(on_gradient(module, self.routed.update, inputs=3, sizes=partial(token_sizes, part)))

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        """Memory of a backward pass, F of both projections in fp32 (kept for the next pass), sums and a solve of
        experts."""
        base, held = super().holds(view, load), 4 * _numbers(view, 0)
        sums, solve = RoutedGrams.bytes_of(view.experts), 0
        if (experts := view.experts) is not None:
            solve = solve_bytes(experts.width, experts.width, load.free, load.accelerated)
        kept = held // load.dtype.itemsize
        return replace(base, running=base.running + held + sums, finishing=held + sums + solve, new_weights=kept)

    def conclude(self, view: LayerStructure) -> LayerResult:
        while self._handles:
            self._handles.pop().remove()
        factors = {role: gram.matrix() for role, gram in self.factors.items()}
        facts = {"tokens": {role: int(gram.tokens) for role, gram in self.factors.items()}}
        for gram in self.factors.values():
            gram.give_up()
        dense, device = LayerResult(factors=factors, facts=facts), self.model.device
        if (routed := self.routed) is None:
            return dense
        dtype = choose_dtype(routed.experts[0].width, self.setting.free_bytes(device), widest(device))
        try:
            return with_experts(f"layer {view.index}", dense, routed, partial(kfac_of_experts, dtype=dtype))
        finally:
            routed.give_up()

    def cost(self, view: LayerStructure, step: Step) -> float:
        """Work per token: the layer is run again, then gradients of activations, and F."""
        return 1.0 if step.phase == "forward" else 2.0 + _numbers(view, 0) / 2 / view.num_weights


class KFACPass(ForwardPass):
    """I per GQA group and MLP channel: A of every sample, with the F that ``GradientPass`` measured."""

    name = "importance"

    def observe(self, view: LayerStructure, hooks: Hooks) -> None:
        self.inputs: dict[Block, InputGram] = {}
        for block in view.prunable:
            self.inputs[block] = gram = InputGram(view.projection(block).in_features).to(self.model.device)
            name = f"layer {view.index}, input of {OUTPUT_ROLE[block]}"
            add = partial(_add_input, gram, partial(token_sizes, view.parts[block]))
            hooks.on_input_and_output(name, view.projection(block).module, add)

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        """Memory of a forward pass, and A of both projections in fp32; then F of both and one solve at a time, beside
        which the A of later ones waits."""
        base, beside, solving = super().holds(view, load), 4 * _numbers(view, 0), 0
        for block in reversed(view.prunable):
            d, n = view.projection(block).weight.shape
            rows = 2 * d  # Cᵀ·W, and the copy that loses its units
            solving = max(solving, beside + solve_bytes(n, rows, load.free - beside, load.accelerated))
            beside += 4 * n * n
        return replace(base, running=base.running + 4 * _numbers(view, 1), finishing=solving)

    def conclude(self, view: LayerStructure) -> LayerResult:
        earlier = self.result_of(GradientPass.name, view.index)
        importance = {block: self._costs(view, block, earlier) for block in view.prunable}
        facts = {name: fact for name, fact in earlier.facts.items() if name != "tokens"}
        return LayerResult(importance | earlier.importance, facts=facts)

    def cost(self, view: LayerStructure, step: Step) -> float:
        return 1.0 + _numbers(view, 1) / 2 / view.num_weights

    def cost_to_finish(self, view: LayerStructure, step: Step) -> float:
        """Work of A⁻¹ and the removal, about 2·n³ operations, where a token takes two for every weight of the layer."""
        return sum(view.projection(block).in_features ** 3 for block in view.prunable) / view.num_weights

    def _costs(self, view: LayerStructure, block: Block, earlier: LayerResult) -> Tensor:
        """Removal costs in float64, so that scores of both solver precisions have one dtype."""
        linear, units, inputs = view.projection(block), view.units(block), self.inputs.pop(block)
        if not units:
            return torch.zeros(0, dtype=torch.float64)
        role, xtx = OUTPUT_ROLE[block], inputs.matrix()
        tokens, counted, width = int(inputs.tokens), earlier.facts["tokens"][role], linear.in_features // units
        inputs.give_up()
        dtype = choose_dtype(len(xtx), self.setting.free_bytes(xtx.device), widest(xtx.device))
        with named(f"layer {view.index}, {role} projection"):
            inverse = inverse_moment(xtx, tokens, dtype)
            del xtx
            gtg = earlier.factors[role].to(linear.weight.device)
            return widened(compensated_costs(linear.weight, inverse, gtg, counted, width))


def _add_gradient(gram: InputGram, gradient: Tensor, size: Tensor | None) -> None:
    gram.update(gradient if size is None else gradient * size)


def _add_input(
    gram: InputGram, sizes: Callable[[Tensor], Tensor | None], x: Tensor, y: Tensor, weight: Tensor | None
) -> None:
    size = sizes(y)
    gram.update(x if size is None else x / size, weight)


def _numbers(view: LayerStructure, axis: int) -> int:
    """Number of elements of F (axis 0) or A (axis 1), both projections together."""
    return sum(int(view.projection(block).weight.shape[axis]) ** 2 for block in view.prunable)
