"""What the passes of every method do in a layer with experts, and what the record says of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.statistics.routed import RoutedGrams, RoutedSlopes, RoutedTokens
from lightning_prune.checkpoint.scores import Scores
from lightning_prune.methods.expert_scores import super_experts
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import EXPERTS, Block


def watch_backward(statistic: RoutedSlopes | RoutedGrams) -> RemovableHandle:
    """Feed the tokens of an experts module, with the gradient at its output, while a layer is differentiated."""

    def listen(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        routed = [part.detach() for part in args[:3]]
        if not output.requires_grad:  # in layer 0 nothing before it does
            output.requires_grad_(True)
        update: Any = statistic.update
        output.register_hook(lambda gradient: update(*routed, gradient))

    handle: RemovableHandle = statistic.experts[0].module.register_forward_hook(listen)
    return handle


def watch_tokens(statistic: RoutedTokens) -> RemovableHandle:
    """Feed the tokens of an experts module alone."""

    def listen(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        statistic.update(*(part.detach() for part in args[:3]))

    handle: RemovableHandle = statistic.experts[0].module.register_forward_hook(listen)
    return handle


def with_experts(
    name: str, dense: LayerResult, statistic: RoutedTokens | None, score: Callable[[Any], Tensor]
) -> LayerResult:
    """The result of a layer with that of its experts, if it has any: the facts, and the importance of every channel,
    also of shared experts.

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


def expert_details(layers: Sequence[LayerStructure], results: Sequence[LayerResult], samples: int) -> dict[str, Any]:
    """For ``method.json``: tokens per expert, layer by layer, and the super experts as [layer, expert]; empty without
    experts. Warns where an expert has fewer tokens than channels.

    Args:
        samples: of the calibration set.
    """
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
    if (starved := sum(count < width for count in counts)) and samples:
        # Experts that hardly any text reaches would need any number: nine of ten are to have enough.
        tenth = counts[len(counts) // 10]
        enough = -(-samples * width // max(1, tenth))
        rank_zero_warn(
            f"{starved} of {len(counts)} experts see fewer tokens than their {width} channels, the fewest {fewest}. "
            f"With --data.num_samples {max(enough, samples + 1)}, or longer windows, nine of ten would see as many."
        )
    return {"experts": {"tokens": tokens, "fewest_tokens": fewest, "super_experts": marked}}
