import pytest
import torch
from torch import Tensor

from lightning_prune.calibration.statistics import gram
from lightning_prune.calibration.statistics.gram import add_gram_, mirror_upper_


def inputs(tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    return x.to(dtype)


def product(parts: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    columns = parts[0].shape[1]
    total = torch.zeros(columns, columns, dtype=dtype)
    for rows in parts:
        add_gram_(total, rows)
    mirror_upper_(total)
    return total


@pytest.fixture(params=[1, 7, 16, 64, 2048])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that divide 64 columns, that do not, and one that holds them all."""
    monkeypatch.setattr(gram, "BLOCK", request.param)
    monkeypatch.setattr(gram, "MIRROR_BLOCK", max(1, request.param // 2))


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_it_is_the_full_product_and_exactly_symmetric(dtype: torch.dtype, tolerance: float) -> None:
    x = inputs(50, 64, dtype)
    found = product([x], dtype)
    expected = torch.stack([torch.outer(row, row) for row in x.double()]).sum(0)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.usefixtures("block")
def test_it_does_not_depend_on_how_tokens_are_split() -> None:
    x = inputs(60, 64)
    whole = product([x])
    for size in (1, 7, 25, 59):
        torch.testing.assert_close(product(list(x.split(size))), whole, rtol=1e-6, atol=1e-6 * float(whole.abs().max()))


def test_mirroring_keeps_the_upper_triangle_and_needs_nothing_of_the_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "MIRROR_BLOCK", 5)
    matrix = inputs(13, 13)
    upper = matrix.triu()
    matrix[torch.ones(13, 13).tril(-1).bool()] = torch.nan
    mirror_upper_(matrix)
    assert torch.equal(matrix, upper + upper.triu(1).T)


@pytest.mark.parametrize("columns", [0, 1, 3])
def test_few_columns_and_no_tokens(columns: int) -> None:
    x = inputs(0, columns)
    assert torch.equal(product([x]), torch.zeros(columns, columns))
