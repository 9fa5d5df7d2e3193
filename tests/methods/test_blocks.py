import random

import pytest
import torch

from lightning_prune.methods.blocks import block_index
from lightning_prune.methods.scores import Scores


def shuffled_table(seed: int) -> tuple[Scores, list[tuple[int, int]]]:
    """Units of layers 0, 2 and 5 in random order, and their (layer, block)."""
    draw = random.Random(seed)
    blocks = [(layer, block) for layer in (0, 2, 5) for block in (0, 1, 2) for _ in range(draw.randrange(5))]
    draw.shuffle(blocks)
    layer, block = (torch.tensor(column) for column in zip(*blocks, strict=True))
    values = torch.rand(len(blocks), dtype=torch.float64)
    ones = torch.ones(len(blocks), dtype=torch.int64)
    return Scores(layer, block, ones, values, ones, values, values, ones.bool(), values), blocks


@pytest.mark.parametrize("seed", range(5))
def test_sums_rows_and_sizes_are_those_of_a_loop_over_the_units(seed: int) -> None:
    scores, blocks = shuffled_table(seed)
    index = block_index(scores)
    names = list(zip(index.layer.tolist(), index.block.tolist(), strict=True))
    assert names == sorted(set(blocks))
    assert [names[i] for i in index.ids.tolist()] == blocks
    assert index.size.tolist() == [blocks.count(name) for name in names]
    assert index.sum(scores.base > 0.5).tolist() == [
        sum(value > 0.5 for value, block in zip(scores.base.tolist(), blocks, strict=True) if block == name)
        for name in names
    ]
    for name, total in zip(names, index.sum(scores.base).tolist(), strict=True):
        assert total == pytest.approx(
            sum(value for value, block in zip(scores.base.tolist(), blocks, strict=True) if block == name)
        )
    assert {name: rows.tolist() for name, rows in index.rows().items()} == {
        name: [row for row, block in enumerate(blocks) if block == name] for name in names
    }


@pytest.mark.parametrize("seed", range(5))
def test_ranks_count_the_earlier_units_of_the_same_block(seed: int) -> None:
    scores, blocks = shuffled_table(seed)
    order = random.Random(seed).sample(range(len(blocks)), k=len(blocks) * 2 // 3)
    expected = [sum(blocks[other] == blocks[row] for other in order[:place]) for place, row in enumerate(order)]
    assert block_index(scores).rank(torch.tensor(order, dtype=torch.int64)).tolist() == expected


def test_integer_sums_are_exact() -> None:
    scores, _ = shuffled_table(0)
    large = torch.full((len(scores.layer),), 2**53 + 1)
    index = block_index(scores)
    assert index.sum(large).tolist() == [size * (2**53 + 1) for size in index.size.tolist()]
