import pytest
import torch

from lightning_prune.calibration.statistics import gram
from lightning_prune.calibration.statistics.gram import add_gram_, mirror_upper_


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
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    expected = sum((torch.outer(row, row) for row in x.double()), torch.zeros(columns, columns, dtype=torch.float64))
    for size in sizes:
        found = torch.full((columns, columns), torch.nan, dtype=dtype).tril(-1)  # of the lower triangle nothing is read
        for rows in x.split(size):
            add_gram_(found, rows)
        upper = found.triu()
        mirror_upper_(found)
        assert torch.equal(found, upper + upper.triu(1).T)
        atol = tolerance * float(expected.norm())
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=atol)
