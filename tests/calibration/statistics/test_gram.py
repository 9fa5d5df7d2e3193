import pytest
import torch
from torch import Tensor

from lightning_prune.calibration.statistics import gram
from lightning_prune.calibration.statistics.gram import add_gram_, mirror_upper_


def inputs(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)


@pytest.mark.parametrize("block", [1, 7, 16, 64, 2048])  # that divide 64 columns, that do not, and one that holds all
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize(("tokens", "columns", "sizes"), [(60, 64, (1, 25, 60)), (0, 1, (1,)), (0, 0, (1,))])
def test_it_is_the_full_product_however_tokens_are_split(
    block: int,
    dtype: torch.dtype,
    tolerance: float,
    tokens: int,
    columns: int,
    sizes: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gram, "BLOCK", block)
    monkeypatch.setattr(gram, "MIRROR_BLOCK", max(1, block // 2))
    x = inputs(tokens, columns).to(dtype)
    expected = sum((torch.outer(row, row) for row in x.double()), torch.zeros(columns, columns, dtype=torch.float64))
    for size in sizes:
        found = torch.zeros(columns, columns, dtype=dtype)
        for rows in x.split(size):
            add_gram_(found, rows)
        mirror_upper_(found)
        assert torch.equal(found, found.T)
        atol = tolerance * float(expected.norm())
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=atol)


def test_mirroring_keeps_the_upper_triangle_and_needs_nothing_of_the_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "MIRROR_BLOCK", 5)
    matrix = inputs(13, 13)
    upper = matrix.triu()
    matrix[torch.ones(13, 13).tril(-1).bool()] = torch.nan
    mirror_upper_(matrix)
    assert torch.equal(matrix, upper + upper.triu(1).T)
