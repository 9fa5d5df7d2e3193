import pytest
import torch
from torch import Tensor

from lightning_prune.methods.masks import MaskRule, parse_structure
from lightning_prune.support.errors import UserError


def random_scores(rows: int = 6, columns: int = 24) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))


def naive_lowest(values: list[float], count: int) -> list[bool]:
    chosen = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    return [i in chosen for i in range(len(values))]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4)])
def test_n_of_every_m_inputs_stay(n: int, m: int) -> None:
    scores = random_scores()
    expected = [
        [flag for start in range(0, 24, m) for flag in naive_lowest(row[start : start + m], m - n)]
        for row in scores.double().tolist()
    ]
    assert MaskRule((n, m), 0.5).mask(scores).tolist() == expected


def test_widths_that_m_does_not_divide_are_refused_with_the_option() -> None:
    with pytest.raises(UserError, match=r"--model\.structure 2:4.*30 inputs"):
        MaskRule((2, 4), 0.5).check_width(30)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_each_row_loses_exactly_its_share(fraction: float) -> None:
    scores = random_scores()
    count = {0.0: 0, 0.1: 2, 0.5: 12, 0.99: 23, 1.0: 24}[fraction]
    assert MaskRule(None, fraction).mask(scores).tolist() == [
        naive_lowest(row, count) for row in scores.double().tolist()
    ]


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.29, 41), (0.5, 72), (1.0, 144)])
def test_a_tensor_loses_exactly_its_share(fraction: float, count: int) -> None:
    scores = random_scores()
    flat = [value for row in scores.double().tolist() for value in row]
    mask = MaskRule(None, fraction, per_tensor=True).mask(scores)
    assert mask.flatten().tolist() == naive_lowest(flat, count)
    assert mask.shape == scores.shape


@pytest.mark.parametrize(
    ("size", "fraction", "count"), [(100, 0.29, 29), (10, 0.7, 7), (1000, 0.57, 570), (30, 0.1, 3)]
)
def test_shares_follow_the_decimal_fraction_not_its_rounding(size: int, fraction: float, count: int) -> None:
    assert int(MaskRule(None, fraction).mask(torch.rand(1, size)).sum()) == count


def test_ties_prune_the_lower_index_first() -> None:
    equal = torch.ones(3, 64)
    assert MaskRule(None, 0.5).mask(equal).tolist() == [[True] * 32 + [False] * 32] * 3
    assert MaskRule((2, 4), 0.5).mask(equal).tolist() == [[True, True, False, False] * 16] * 3
    assert MaskRule(None, 0.5, per_tensor=True).mask(equal).flatten().tolist() == [True] * 96 + [False] * 96


def test_half_precision_scores_are_ordered_alike() -> None:
    scores = random_scores().bfloat16()
    rule = MaskRule(None, 0.5)
    assert torch.equal(rule.mask(scores), rule.mask(scores.double()))


def test_nan_scores_are_refused() -> None:
    scores = random_scores()
    scores[1, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        MaskRule(None, 0.5).mask(scores)


def test_structures_are_parsed() -> None:
    assert [parse_structure(text) for text in ("group", "unstructured", "2:4", "4:8")] == [None, None, (2, 4), (4, 8)]
