import pytest
import torch

from lightning_prune.methods.scores import COLUMNS, Scores, group_scores, layer_scores
from lightning_prune.models.families import anatomy
from tests.tiny import make_tiny


def measured() -> Scores:
    generator = torch.Generator().manual_seed(0)
    views = anatomy(make_tiny())
    attention = [torch.rand(2, generator=generator) for _ in views]
    mlp = [torch.rand(40, generator=generator, dtype=torch.float64) ** 20 for _ in views]
    return group_scores(views, attention, mlp)


def test_rows_are_in_the_order_of_layer_block_and_unit() -> None:
    scores = measured()
    rows = list(zip(scores.layer.tolist(), scores.block.tolist(), scores.unit.tolist(), strict=True))
    assert rows == [(layer, b, u) for layer in range(4) for b, n in ((0, 2), (1, 40)) for u in range(n)]
    assert set(scores.cost[scores.block == 0].tolist()) == {
        2 * 2 * 8 * 32 + 2 * 8 * 32
    }  # two query heads, one k, one v
    assert set(scores.cost[scores.block == 1].tolist()) == {3 * 32}
    assert torch.equal(scores.score, scores.importance / scores.cost)
    assert scores.of(2, "mlp").nonzero().flatten().tolist() == list(range(2 * 42 + 2, 3 * 42))


@pytest.mark.parametrize(
    "table", [measured(), layer_scores(torch.tensor([0.1, 1 / 3]), [50, 50])], ids=["units", "layers"]
)
def test_columns_give_back_the_same_bits(table: Scores) -> None:
    table = table.with_pruned(torch.arange(len(table.layer)) % 3 == 0)
    again = Scores.from_columns(table.columns())
    for column in COLUMNS:
        before, after = getattr(table, column), getattr(again, column)
        assert torch.equal(before, after), column
        assert before.dtype == after.dtype, column
    assert torch.equal(again.base, table.importance / table.cost)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_importance_that_is_not_finite_names_layer_and_block(value: float) -> None:
    views = anatomy(make_tiny())
    mlp = [torch.ones(40) for _ in views]
    mlp[2][7] = value
    with pytest.raises(FloatingPointError, match="layer 2, mlp: 1 importances are NaN or infinite"):
        group_scores(views, [torch.ones(2) for _ in views], mlp)
