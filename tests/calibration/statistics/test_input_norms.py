import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.calibration.statistics.channel_sums import SumOfSquares


def sample_inputs(samples: int = 12, tokens: int = 5, channels: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, tokens, channels, generator=generator)
    return x * torch.logspace(-3, 3, channels)


def naive(x: Tensor) -> list[float]:
    rows = x.double().reshape(-1, x.shape[-1]).tolist()
    return [math.fsum(row[j] ** 2 for row in rows) for j in range(x.shape[-1])]


def accumulated(batches: Any) -> SumOfSquares:
    statistic = SumOfSquares(7)
    for batch in batches:
        statistic.update(batch)
    return statistic


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 12])
def test_any_batch_size_gives_the_naive_sum(batch_size: int) -> None:
    x = sample_inputs()
    statistic = accumulated(x.split(batch_size))
    torch.testing.assert_close(statistic.compute(), torch.tensor(naive(x), dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistic.norms() ** 2, torch.tensor(naive(x), dtype=torch.float64), rtol=1e-6, atol=0)
    assert int(statistic.tokens) == 60


def test_sample_order_does_not_matter() -> None:
    x = sample_inputs()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        accumulated(x.split(4)).norms(), accumulated(x[order].split(4)).norms(), rtol=1e-12, atol=0
    )


def test_samples_of_weight_zero_are_dropped() -> None:
    x = sample_inputs()
    padded = torch.cat([x[:5], torch.full((3, 5, 7), 1e4)])
    statistic = SumOfSquares(7)
    statistic.update(padded, torch.tensor([1, 1, 1, 1, 1, 0, 0, 0]))
    expected = torch.tensor(naive(x[:5]), dtype=torch.float64)
    torch.testing.assert_close(statistic.compute(), expected, rtol=1e-6, atol=0)
    assert int(statistic.tokens) == 25


def test_half_precision_inputs_are_squared_after_the_cast() -> None:
    statistic = SumOfSquares(1)
    statistic.update(torch.full((2, 3, 1), 300.0, dtype=torch.float16))  # 300² overflows fp16
    assert statistic.sum_of_squares.tolist() == [6 * 300.0**2]
    assert statistic.norms().tolist() == [(6 * 300.0**2) ** 0.5]  # a vector for one channel too


def test_many_small_terms_do_not_stall_the_sum() -> None:
    statistic = SumOfSquares(1)
    statistic.update(torch.full((1, 1, 1), 8192.0))
    for _ in range(10):
        statistic.update(torch.ones(1, 1, 1))  # 2²⁶ + 1 = 2²⁶ in fp32
    assert float(statistic.compute()) == 2.0**26 + 10


def test_repeating_the_data_scales_norms_by_the_square_root_of_two() -> None:
    x = sample_inputs()
    once, twice = accumulated([x]).norms(), accumulated([x, x]).norms()
    torch.testing.assert_close(twice, once * 2**0.5, rtol=1e-12, atol=0)


def test_states_keep_their_dtypes_when_the_default_is_half() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        statistic = SumOfSquares(7)
        statistic.update(sample_inputs().bfloat16())
    finally:
        torch.set_default_dtype(torch.float32)
    assert statistic.sum_of_squares.dtype == torch.float64
    assert statistic.tokens.dtype == torch.int64


def test_a_computed_sum_does_not_change_with_later_updates() -> None:
    statistic = accumulated([sample_inputs()])
    before = statistic.compute()
    kept = before.clone()
    statistic.update(sample_inputs())
    assert torch.equal(before, kept)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_activations_are_reported_with_the_name(value: float) -> None:
    x = sample_inputs()
    statistic = accumulated([x])
    statistic.raise_if_not_finite("layer 3 output")
    x[2, 1, 4] = value
    statistic.update(x)
    with pytest.raises(FloatingPointError, match="layer 3 output: 1 of 7"):
        statistic.raise_if_not_finite("layer 3 output")


def test_no_graph_is_kept() -> None:
    x = sample_inputs().requires_grad_()
    assert not accumulated([x * 2]).sum_of_squares.requires_grad
