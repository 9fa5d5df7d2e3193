import numpy as np
import pytest
import torch

from lightning_prune.checkpoint.scores import Scores
from lightning_prune.methods.scores import group_scores, layer_scores
from lightning_prune.models.families import layer_structures
from lightning_prune.models.vocabulary import Block
from tests.tiny import make_tiny


def measured() -> Scores:
    generator = torch.Generator().manual_seed(0)
    views = layer_structures(make_tiny())
    attention = [torch.rand(2, generator=generator) for _ in views]
    mlp = [torch.rand(40, generator=generator, dtype=torch.float64) ** 20 for _ in views]
    return group_scores(views, [{Block.ATTENTION: a, Block.MLP: m} for a, m in zip(attention, mlp, strict=True)])


def test_rows_are_in_the_order_of_layer_block_and_unit() -> None:
    scores = measured()
    rows = list(zip(scores.layer.tolist(), scores.block.tolist(), scores.unit.tolist(), strict=True))
    assert rows == [(layer, b, u) for layer in range(4) for b, n in (("attention", 2), ("mlp", 40)) for u in range(n)]
    group = 2 * 2 * 8 * 32 + 2 * 8 * 32  # two query heads, one k, one v
    assert set(scores.cost[scores.of_kind(Block.ATTENTION)].tolist()) == {group}
    assert set(scores.cost[scores.of_kind(Block.MLP)].tolist()) == {3 * 32}
    assert np.array_equal(scores.score, scores.importance / scores.cost)
    layers = layer_scores(torch.tensor([0.1, 0.5]), [50, 60])
    assert layers.whole_layers
    assert layers.cost.tolist() == [50, 60]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_importance_that_is_not_finite_names_layer_and_block(value: float) -> None:
    views = layer_structures(make_tiny())
    importance = [{Block.ATTENTION: torch.ones(2), Block.MLP: torch.ones(40)} for _ in views]
    importance[2][Block.MLP][7] = value
    with pytest.raises(FloatingPointError, match="layer 2, mlp: 1 importances are NaN or infinite"):
        group_scores(views, importance)
