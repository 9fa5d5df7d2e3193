import math

import pytest
import torch
from torch import Tensor

from lightning_prune.calibration.statistics.gram import InputGram


def sample_inputs() -> Tensor:
    return torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1, 1, 5, 20.0])


def naive(rows: Tensor) -> Tensor:
    values = rows.double().tolist()
    width = rows.shape[-1]
    return torch.tensor(
        [[math.fsum(row[i] * row[j] for row in values) for j in range(width)] for i in range(width)],
        dtype=torch.float64,
    )


def assert_gram(gram: Tensor, expected: Tensor) -> None:
    scale = expected.diagonal().sqrt()
    error = (gram.double() - expected).abs() / (scale[:, None] * scale)
    assert float(error.max()) < 1e-6


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 8])
def test_any_batch_size_gives_the_naive_product(batch_size: int) -> None:
    x = sample_inputs()
    statistic = InputGram(5)
    for batch in x.split(batch_size):
        statistic.update(batch)
    gram, tokens = statistic.matrix(), statistic.tokens
    assert_gram(gram, naive(x.reshape(-1, 5)))
    assert int(tokens) == 48


def test_sample_order_does_not_matter() -> None:
    x = sample_inputs()
    statistic = InputGram(5)
    for batch in x.flip(0).split(3):
        statistic.update(batch)
    assert_gram(statistic.matrix(), naive(x.reshape(-1, 5)))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_max_tokens_takes_the_first_tokens_whatever_the_batch_size(batch_size: int) -> None:
    x = sample_inputs()
    statistic = InputGram(5, max_tokens=20)  # ends inside the fourth sample
    for batch in x.split(batch_size):
        statistic.update(batch)
    gram, tokens = statistic.matrix(), statistic.tokens
    assert int(tokens) == 20
    assert_gram(gram, naive(x.reshape(-1, 5)[:20]))


def test_max_tokens_skips_dropped_samples() -> None:
    x = sample_inputs()
    statistic = InputGram(5, max_tokens=9)
    statistic.update(x, torch.tensor([0, 1, 0, 1, 1, 1, 1, 1]))
    assert_gram(statistic.matrix(), naive(torch.cat([x[1], x[3, :3]])))


def test_samples_of_weight_zero_are_dropped() -> None:
    x = sample_inputs()
    statistic = InputGram(5)
    statistic.update(x, torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]))
    gram, tokens = statistic.matrix(), statistic.tokens
    assert_gram(gram, naive(x[[0, 2, 3, 5, 6, 7]].reshape(-1, 5)))
    assert int(tokens) == 36


def test_autocast_does_not_lower_the_precision_of_the_product() -> None:
    x = sample_inputs()
    statistic = InputGram(5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            statistic.update(x)
        assert torch.get_float32_matmul_precision() == "medium"  # the caller's setting is given back
    finally:
        torch.set_float32_matmul_precision(before)
    assert_gram(statistic.matrix(), naive(x.reshape(-1, 5)))


def test_one_channel_gives_a_matrix() -> None:
    statistic = InputGram(1)
    statistic.update(torch.full((2, 3, 1), 2.0))
    assert statistic.matrix().tolist() == [[24.0]]


def test_half_precision_inputs_are_multiplied_in_fp32() -> None:
    statistic = InputGram(2)
    statistic.update(torch.full((1, 4, 2), 300.0, dtype=torch.float16))
    assert statistic.matrix().tolist() == [[360000.0, 360000.0]] * 2
    assert statistic.gram.dtype == torch.float32


def test_non_finite_activations_are_reported_with_the_name() -> None:
    x = sample_inputs()
    x[0, 0, 2] = math.inf
    statistic = InputGram(5)
    statistic.update(x)
    with pytest.raises(FloatingPointError, match="layer 0 down"):
        statistic.raise_if_not_finite("layer 0 down")
