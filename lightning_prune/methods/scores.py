"""One row per prunable unit: what a method measured, what it made of it, and what it decided (``scores.csv``)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.models.families import LayerAnatomy

Block = Literal["attention", "mlp", "layer"]
BLOCKS: tuple[Block, ...] = ("attention", "mlp", "layer")
COLUMNS = ("layer", "block", "unit", "importance", "cost", "prior", "score", "pruned")


@dataclass(frozen=True)
class Scores:
    """U prunable units. ``block`` indexes ``BLOCKS``; an attention unit is one KV head with its query heads
    (GQA group), an mlp unit one intermediate channel, a layer unit a whole decoder layer.

    Shapes ``[U]``: layer, block, unit, cost int64 (cost in parameters); importance, prior, score, base float64;
    pruned bool. ``base`` is S, the score before any prior; it breaks ties and is not in the file, where it is
    importance / cost.
    """

    layer: Tensor
    block: Tensor
    unit: Tensor
    importance: Tensor
    cost: Tensor
    prior: Tensor
    score: Tensor
    pruned: Tensor
    base: Tensor

    def of(self, layer: int, block: Block) -> Tensor:
        """Row mask ``[U]`` of one block of one layer."""
        return (self.layer == layer) & (self.block == BLOCKS.index(block))

    def with_pruned(self, pruned: Tensor) -> "Scores":
        """The same scores with another decision, bool ``[U]``."""
        return replace(self, pruned=pruned)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns of ``scores.csv``, ``[U]`` each; ``block`` by name."""
        columns = {name: getattr(self, name).numpy() for name in COLUMNS}
        return columns | {"block": np.array(BLOCKS)[columns["block"]]}

    @classmethod
    def from_columns(cls, columns: Mapping[str, NDArray[Any]]) -> "Scores":
        """Scores that an earlier run wrote, from what ``columns`` gives."""
        found = {name: torch.tensor(columns[name]) for name in COLUMNS if name != "block"}
        codes = np.argmax(np.array(BLOCKS)[:, None] == columns["block"], axis=0)
        return cls(block=torch.tensor(codes), base=found["importance"] / found["cost"], **found)


def group_scores(layers: Sequence[LayerAnatomy], attention: Sequence[Tensor], mlp: Sequence[Tensor]) -> Scores:
    """Scores of all groups before any prior: score = importance / cost.

    Args:
        layers: the anatomy of the dense model, L entries.
        attention: L tensors ``[K]``, importance per GQA group.
        mlp: L tensors ``[F]``, importance per channel.

    Raises:
        FloatingPointError: an importance is NaN or infinite; the message names layer and block.
    """
    parts = []
    for view, attention_importance, mlp_importance in zip(layers, attention, mlp, strict=True):
        for block, values, cost in (
            (0, attention_importance, view.attention_unit_cost),
            (1, mlp_importance, view.mlp_unit_cost),
        ):
            if not bool(torch.isfinite(values).all()):
                raise FloatingPointError(
                    f"layer {view.index}, {BLOCKS[block]}: {int((~torch.isfinite(values)).sum())} importances "
                    "are NaN or infinite."
                )
            parts.append(_rows(view.index, block, values, cost))
    return Scores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def groups_that_stay(layers: Sequence[LayerAnatomy]) -> str:
    """A sentence, with a space before it, on why no GQA group is a candidate; nothing where groups may leave."""
    reason = layers[0].whole_attention
    return f" GQA groups of this family stay: {reason}. MLP channels and whole layers can go." if reason else ""


def layer_scores(importance: Tensor, cost: Sequence[int]) -> Scores:
    """Scores of whole layers (depth pruning): score = importance ``[L]``, cost in parameters per layer."""
    count = len(cost)
    return Scores(
        layer=torch.arange(count),
        block=torch.full((count,), BLOCKS.index("layer")),
        unit=torch.zeros(count, dtype=torch.int64),
        importance=importance.double().cpu(),
        cost=torch.tensor(list(cost), dtype=torch.int64),
        prior=torch.ones(count, dtype=torch.float64),
        score=importance.double().cpu(),
        pruned=torch.zeros(count, dtype=torch.bool),
        base=importance.double().cpu(),
    )


def _rows(layer: int, block: int, values: Tensor, cost: int) -> tuple[Tensor, ...]:
    count = len(values)
    importance = values.detach().double().cpu()
    return (
        torch.full((count,), layer),
        torch.full((count,), block),
        torch.arange(count),
        importance,
        torch.full((count,), cost),
        torch.ones(count, dtype=torch.float64),
        importance / cost,
        torch.zeros(count, dtype=torch.bool),
        importance / cost,
    )
