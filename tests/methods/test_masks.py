import pytest
import torch
from torch import Tensor

from lightning_prune.methods.masks import MaskRule, parse_structure

SCORES = torch.rand(6, 24, generator=torch.Generator().manual_seed(0))


def naive_lowest(values: list[float], count: int) -> list[bool]:
    chosen = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    return [i in chosen for i in range(len(values))]


@pytest.mark.parametrize("scores", [SCORES, SCORES.bfloat16(), torch.ones(6, 24)], ids=["random", "half", "ties"])
@pytest.mark.parametrize(
    ("rule", "run", "count"),  # so many of every run of scores, row by row
    [
        *((MaskRule((n, m), 0.5), m, m - n) for n, m in ((2, 4), (4, 8), (1, 4), (3, 4))),
        *((MaskRule(None, part), 24, count) for part, count in ((0.0, 0), (0.1, 2), (0.5, 12), (0.99, 23), (1.0, 24))),
        *((MaskRule(None, part, per_tensor=True), 144, int(part * 144)) for part in (0.0, 0.29, 0.5, 1.0)),
    ],
    ids=str,
)
def test_the_lowest_are_removed_and_of_ties_the_first(rule: MaskRule, run: int, count: int, scores: Tensor) -> None:
    flat = scores.double().flatten().tolist()
    expected = [flag for start in range(0, 144, run) for flag in naive_lowest(flat[start : start + run], count)]
    assert rule.mask(scores).shape == scores.shape
    assert rule.mask(scores).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("size", "fraction", "count"), [(100, 0.29, 29), (10, 0.7, 7), (1000, 0.57, 570), (30, 0.1, 3)]
)
def test_shares_follow_the_decimal_fraction_not_its_rounding(size: int, fraction: float, count: int) -> None:
    assert int(MaskRule(None, fraction).mask(torch.rand(1, size)).sum()) == count


def test_nan_scores_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="NaN"):
        MaskRule(None, 0.5).mask(torch.full((2, 4), torch.nan))


def test_structures_are_parsed() -> None:
    assert [parse_structure(text) for text in ("group", "unstructured", "2:4", "4:8")] == [None, None, (2, 4), (4, 8)]
