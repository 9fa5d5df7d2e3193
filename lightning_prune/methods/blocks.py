"""The units of one block of one layer, for all blocks at once: sums, ranks and rows without a loop over the units."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_prune.methods.scores import BLOCKS, Scores


@dataclass(frozen=True)
class BlockIndex:
    """B blocks that have units, ascending by (layer, block).

    ``ids``: int64 ``[U]``, the block of every unit, 0 … B − 1. ``layer``, ``block``: int64 ``[B]``, as in ``Scores``.
    ``size``: int64 ``[B]``, units per block.
    """

    ids: Tensor
    layer: Tensor
    block: Tensor
    size: Tensor

    def __len__(self) -> int:
        """B."""
        return len(self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Sums per block ``[B]`` of ``values`` ``[U]``; int64 for integers and flags (exact), float64 for floats."""
        kind = torch.float64 if values.is_floating_point() else torch.int64
        return torch.zeros(len(self), dtype=kind).index_add_(0, self.ids, values.to(kind))

    def rows(self) -> dict[tuple[int, int], Tensor]:
        """Rows of every block by (layer, block), int64, ascending: for what must be computed block by block."""
        parts = self.ids.argsort(stable=True).split(self.size.tolist())
        return dict(zip(zip(self.layer.tolist(), self.block.tolist(), strict=True), parts, strict=True))

    def rank(self, order: Tensor) -> Tensor:
        """How many units of the same block come earlier in ``order`` (rows, each at most once), int64, as long."""
        ids = self.ids[order]
        by_block = ids.argsort(stable=True)
        counts = torch.bincount(ids, minlength=len(self))
        starts = counts.cumsum(0) - counts
        rank = torch.empty_like(by_block)
        rank[by_block] = torch.arange(len(order)) - starts[ids[by_block]]
        return rank


def block_index(scores: Scores) -> BlockIndex:
    """Blocks of U units, in any order of rows."""
    keys, ids, size = np.unique(
        (scores.layer * len(BLOCKS) + scores.block).numpy(), return_inverse=True, return_counts=True
    )
    return BlockIndex(
        torch.from_numpy(ids.reshape(-1)),
        torch.from_numpy(keys // len(BLOCKS)),
        torch.from_numpy(keys % len(BLOCKS)),
        torch.from_numpy(size),
    )
