"""Importance of experts, the same for every method, and what the run's record says of them.

E experts of width m, shared ones included. A token that is not routed to an expert adds nothing, so losses are means
over all tokens and experts compare with each other; an expert without tokens is worth 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.statistics.routed import RoutedOutputs, RoutedTokens
from lightning_prune.checkpoint.scores import Scores
from lightning_prune.models.experts import Experts
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import EXPERTS, Block

SUPER_QUANTILE, SUPER_SHARE = 0.995, 0.1


def magnitude(experts: Experts) -> Tensor:
    """Σ |w| over the channel's weights, fp32 ``[E, m]``."""
    return experts.channel_sums(partial(_sizes, experts))


def wanda(sums: RoutedOutputs) -> Tensor:
    """Σ |W_ij|·‖X_j‖₂ over the channel's weights, ``[E, m]`` (Wanda, eq. 1), over the tokens routed to the expert, each
    weighed by the router's g, by which the expert's output is multiplied: ‖X_j‖₂ = √(Σ_t g_t²·x_tj²)."""
    experts = sums.experts[0]
    norms = {"inner": sums.inputs.sqrt().float(), "down": sums.inner.sqrt().float()}
    return experts.channel_sums(lambda role, expert: _sizes(experts, role, expert) * norms[role][expert])


def _sizes(experts: Experts, role: str, expert: int) -> Tensor:
    return experts.part(role, expert).detach().float().abs()


def super_experts(peaks: Tensor) -> Tensor:
    """Experts without which a model breaks, bool ``[L, E]`` (Su et al. 2025, "Unveiling Super Experts in
    Mixture-of-Experts Large Language Models"): the largest |f_e(x)_j| of all tokens, ``peaks``, lies above the 99.5th
    percentile of all experts of all layers, and above a tenth of the largest."""
    return (peaks > peaks.quantile(SUPER_QUANTILE)) & (peaks > SUPER_SHARE * peaks.max())


def on_gradient(
    module: nn.Module,
    update: Callable[..., Any],
    inputs: int = 0,
    sizes: Callable[[Tensor], Tensor | None] | None = None,
) -> RemovableHandle:
    """Call ``update`` with the gradient at a module's output, after so many of its ``inputs``, while a layer is
    differentiated; with the ``sizes`` of the output too, where given."""

    def listen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        read = [part.detach() for part in args[:inputs]]
        more = [] if sizes is None else [sizes(output)]
        if not output.requires_grad:  # in layer 0 nothing before it does
            output.requires_grad_(True)
        output.register_hook(lambda gradient: update(*read, gradient, *more))

    return module.register_forward_hook(listen)


def with_experts(
    name: str, dense: LayerResult, statistic: RoutedTokens | None, score: Callable[[Any], Tensor]
) -> LayerResult:
    """The result of a layer and of its experts, if it has any: their facts, and the importance of every channel.

    Raises:
        FloatingPointError: something that was summed is NaN or infinite.
    """
    if statistic is None:
        return dense
    statistic.raise_if_not_finite(f"{name}, experts")
    importance = dense.importance | {Block.EXPERT_CHANNEL: score(statistic).flatten()}
    return replace(dense, importance=importance, facts=dense.facts | statistic.facts())


def in_units(view: LayerStructure, importance: dict[Block, Tensor]) -> dict[Block, Tensor]:
    """The same importances; an expert's is the sum of its channels where whole experts are the units."""
    if Block.EXPERT not in view.parts or Block.EXPERT in importance:
        return importance
    assert view.experts is not None
    channels = importance[Block.EXPERT_CHANNEL].view(view.experts.total, -1)
    return importance | {Block.EXPERT: channels.sum(1)[: view.experts.count]}


def marked(scores: Scores, details: dict[str, Any]) -> Scores:
    """``scores`` with super experts, or their channels, marked; ``details`` of ``expert_details``."""
    if not details:
        return scores
    facts, rows = details["experts"], np.zeros(len(scores.unit), dtype=bool)
    for layer, expert in facts["super_experts"]:
        for block in EXPERTS:
            here = scores.of(layer, block)
            each = here.sum() // len(facts["tokens"][layer])  # units of one expert
            rows |= here & np.equal(scores.unit // max(1, each), expert)
    return replace(scores, super_expert=rows)


def expert_details(
    layers: Sequence[LayerStructure], results: Sequence[LayerResult], samples: int, channels: bool = True
) -> dict[str, Any]:
    """Facts for ``method.json``: tokens per expert, layer by layer, and the super experts as [layer, expert]; empty
    without experts. Warns where an expert has fewer tokens than channels, if ``channels`` are ranked or refitted, else
    where it has none; ``samples``: size of the calibration set."""
    seen = [
        (view, result.facts["experts"])
        for view, result in zip(layers, results, strict=True)
        if result.facts.get("experts")
    ]
    if not seen:
        return {}
    tokens = {view.index: facts["tokens"] for view, facts in seen}
    peaks = torch.tensor([facts["peaks"] for _, facts in seen])
    marked = [[seen[place][0].index, expert] for place, expert in super_experts(peaks).nonzero().tolist()]
    counts = sorted(count for of in tokens.values() for count in of)
    fewest, width = counts[0], max(view.experts.width for view, _ in seen if view.experts is not None)
    if channels and samples and fewest < width:
        rank_zero_warn(_few_tokens(counts, width, samples))
    elif samples and fewest == 0:
        rank_zero_warn(
            f"{counts.count(0)} of {len(counts)} experts see no token of the calibration set, so they are scored as "
            "worth nothing. More text (--data.num_samples) may reach them."
        )
    return {"experts": {"tokens": tokens, "fewest_tokens": fewest, "super_experts": marked}}


def _few_tokens(counts: list[int], width: int, samples: int) -> str:
    """The warning on experts of so many channels, of which some see fewer tokens; ``counts`` are sorted."""
    # Experts that hardly any text reaches would need any number: nine of ten are to have enough.
    tenth = counts[len(counts) // 10]
    remedy = (
        f"With --data.num_samples {-(-samples * width // max(1, tenth))}, or longer windows, nine of ten experts "
        "would see enough."
        if tenth < width
        else "The others see enough; these are hardly ever chosen for this text."
    )
    return (
        f"{sum(count < width for count in counts)} of {len(counts)} experts see fewer tokens than their {width} "
        f"channels, the fewest {counts[0]}. {remedy}"
    )
