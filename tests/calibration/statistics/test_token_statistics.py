"""Statistics of inputs are the naive float64 sums, whatever the batch size, the order of samples and the precision."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_prune.calibration.statistics.block_influence import BlockInfluence
from lightning_prune.calibration.statistics.channel_sums import SumOfSquares
from lightning_prune.calibration.statistics.gram import InputGram
from lightning_prune.calibration.statistics.token_statistic import TokenStatistic

CHANNELS = 6


def inputs() -> Tensor:
    x = torch.randn(12, 5, CHANNELS, generator=torch.Generator().manual_seed(0))
    return x * torch.logspace(-3, 3, CHANNELS)


def naive_influence(rows: Tensor) -> Tensor:
    """The first channels are the stream before the layer, the last ones the stream after it."""
    before, after = rows.chunk(2, -1)
    return (1 - (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))).mean()


class Case(NamedTuple):
    make: Callable[[], Any]
    value: Callable[[Any], Tensor]
    naive: Callable[[Tensor], Tensor]  # of float64 rows [T, CHANNELS]


CASES = {
    "norms": Case(lambda: SumOfSquares(CHANNELS), SumOfSquares.norms, lambda rows: rows.square().sum(0).sqrt()),
    "gram": Case(lambda: InputGram(CHANNELS), InputGram.matrix, lambda rows: rows.T @ rows),
    "block influence": Case(BlockInfluence, BlockInfluence.reduced, naive_influence),
}
every_statistic = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def accumulated(case: Case, batches: Iterable[Tensor], weight: Tensor | None = None) -> Any:
    statistic = case.make()
    for batch in batches:
        statistic.update(*(batch.chunk(2, -1) if isinstance(statistic, BlockInfluence) else [batch]), weight)
    return statistic


def assert_naive(case: Case, statistic: TokenStatistic, x: Tensor) -> None:
    """Entries of a Gram matrix are as exact as the norms of their two channels allow."""
    rows = x.double().reshape(-1, x.shape[-1])
    expected = case.naive(rows)
    scale = torch.outer(rows.norm(dim=0), rows.norm(dim=0)) if expected.ndim == 2 else expected
    assert float(((case.value(statistic).double() - expected).abs() / scale).max()) < 1e-6
    assert int(statistic.tokens) == len(rows)


@every_statistic
@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_any_batch_size_and_order_give_the_naive_value(case: Case, batch_size: int) -> None:
    assert_naive(case, accumulated(case, inputs().split(batch_size)), inputs())
    assert_naive(case, accumulated(case, inputs().flip(0).split(batch_size)), inputs())


@every_statistic
def test_samples_of_weight_zero_are_dropped(case: Case) -> None:
    x = torch.cat([inputs()[:5], torch.full((3, 5, CHANNELS), torch.nan)])[[0, 5, 1, 2, 6, 3, 7, 4]]
    weight = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1])
    assert_naive(case, accumulated(case, [x], weight), x[weight > 0])


@every_statistic
def test_half_precision_and_autocast_do_not_lower_the_precision(case: Case) -> None:
    x = inputs().half() + 300  # whose squares overflow
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            statistic = accumulated(case, x.split(4))
        assert torch.get_float32_matmul_precision() == "medium"  # the caller's setting is given back
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision(before)
    assert_naive(case, statistic, x)


@every_statistic
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_activations_are_reported_with_the_name_and_no_graph_is_kept(case: Case, value: float) -> None:
    x = inputs().requires_grad_()
    statistic = accumulated(case, [x * 1])
    statistic.raise_if_not_finite("layer 3 output")
    assert not case.value(statistic).requires_grad
    x = inputs()
    x[2, 1, 4] = value
    with pytest.raises(FloatingPointError, match=r"layer 3 output: \d+ of \d+ values"):
        accumulated(case, [inputs(), x]).raise_if_not_finite("layer 3 output")


def test_many_small_terms_do_not_stall_the_sum() -> None:
    statistic = SumOfSquares(1)
    statistic.update(torch.full((1, 1, 1), 8192.0))
    for _ in range(10):
        statistic.update(torch.ones(1, 1, 1))  # 2²⁶ + 1 = 2²⁶ in fp32
    assert float(statistic.compute()) == 2.0**26 + 10


def test_one_channel_gives_a_vector_or_a_matrix() -> None:
    norms, gram = SumOfSquares(1), InputGram(1)
    for statistic in (norms, gram):
        statistic.update(torch.full((2, 3, 1), 2.0))
    assert norms.norms().tolist() == [24**0.5]  # where torchmetrics would give scalars
    assert gram.matrix().tolist() == [[24.0]]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("dropped", [[], [0, 2]])
def test_max_tokens_takes_the_first_that_count_whatever_the_batch_size(batch_size: int, dropped: list[int]) -> None:
    x, weight = inputs(), torch.ones(12)
    weight[dropped] = 0
    statistic = InputGram(CHANNELS, max_tokens=18)  # ends inside the fourth sample
    for batch, counted in zip(x.split(batch_size), weight.split(batch_size), strict=True):
        statistic.update(batch, counted)
    assert_naive(CASES["gram"], statistic, x[weight > 0].reshape(-1, CHANNELS)[:18])


@pytest.mark.parametrize(("factor", "influence"), [(1, 0.0), (-3, 2.0), (0, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_influence_of_a_layer_that_keeps_reverses_or_erases(factor: int, influence: float, dtype: torch.dtype) -> None:
    x = (inputs() % 300).to(dtype)
    statistic = BlockInfluence()
    statistic.update(x, factor * x)
    assert float(statistic.compute()) == (influence if factor == 1 else pytest.approx(influence, abs=1e-6))


def test_states_that_are_not_sums_are_refused() -> None:
    """Processes add them up, whatever torchmetrics is told."""
    with pytest.raises(ValueError, match=r"peak: found dist_reduce_fx='max'; states .* are sums"):
        SumOfSquares(CHANNELS).add_state("peak", torch.zeros(()), dist_reduce_fx="max")
