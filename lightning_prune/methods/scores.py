"""Importances → one row per prunable unit."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_prune.checkpoint.scores import BLOCKS, Scores
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import Block


def group_scores(layers: Sequence[LayerStructure], attention: Sequence[Tensor], mlp: Sequence[Tensor]) -> Scores:
    """Scores of all groups before any prior: score = importance / cost. An attention unit is one KV head with its query
    heads (GQA group), an MLP unit one intermediate channel.

    Args:
        layers: the anatomy of the dense model, L entries.
        attention: L tensors ``[K]``, importance per GQA group.
        mlp: L tensors ``[F]``, importance per channel.

    Raises:
        FloatingPointError: an importance is NaN or infinite; the message names layer and block.
    """
    parts: list[tuple[int, Block, Tensor, int]] = []
    for view, groups, channels in zip(layers, attention, mlp, strict=True):
        parts.append((view.index, Block.ATTENTION, groups, view.unit_cost(Block.ATTENTION)))
        parts.append((view.index, Block.MLP, channels, view.unit_cost(Block.MLP)))
    for layer, block, values, _ in parts:
        if bad := int((~torch.isfinite(values)).sum()):
            raise FloatingPointError(f"layer {layer}, {block}: {bad} importances are NaN or infinite.")
    count = [len(values) for *_, values, _ in parts]
    importance = torch.cat([values.detach().cpu().double() for *_, values, _ in parts]).numpy()
    cost = np.repeat([cost for *_, cost in parts], count)
    return Scores(
        layer=np.repeat([layer for layer, *_ in parts], count),
        code=np.repeat([BLOCKS.index(block) for _, block, *_ in parts], count),
        unit=np.concatenate([np.arange(units) for units in count]),
        importance=importance,
        cost=cost,
        prior=np.ones(len(cost)),
        score=importance / cost,
        pruned=np.zeros(len(cost), dtype=bool),
        base=importance / cost,
    )


def layer_scores(importance: Tensor, cost: Sequence[int]) -> Scores:
    """Scores of whole layers (depth pruning): score = importance ``[L]``, cost in parameters per layer."""
    values, count = importance.cpu().double().numpy(), len(cost)
    return Scores(
        layer=np.arange(count),
        code=np.full(count, BLOCKS.index(Block.LAYER)),
        unit=np.zeros(count, dtype=np.int64),
        importance=values,
        cost=np.array(cost, dtype=np.int64),
        prior=np.ones(count),
        score=values,
        pruned=np.zeros(count, dtype=bool),
        base=values,
    )


def groups_that_stay(layers: Sequence[LayerStructure]) -> str:
    """A sentence, with a space before it, on why no GQA group is a candidate; nothing where groups may be pruned."""
    reason = layers[0].whole_attention
    return f" GQA groups of this family stay: {reason}. MLP channels and whole layers can go." if reason else ""
