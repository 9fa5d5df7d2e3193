import math

import pytest
import torch
from torch import Tensor

from lightning_prune.calibration.statistics.block_influence import BlockInfluence


def streams() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(6, 4, 9, generator=generator)
    return before, before + 0.5 * torch.randn(6, 4, 9, generator=generator)


def naive(before: Tensor, after: Tensor) -> float:
    distances = []
    pairs = zip(before.double().reshape(-1, 9).tolist(), after.double().reshape(-1, 9).tolist(), strict=True)
    for a, b in pairs:
        dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
        norm = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b))
        distances.append(1 - (dot / norm if norm else 0.5))
    return math.fsum(distances) / len(distances)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 6])
def test_any_batch_size_gives_the_naive_mean(batch_size: int) -> None:
    before, after = streams()
    statistic = BlockInfluence()
    for x, y in zip(before.split(batch_size), after.split(batch_size), strict=True):
        statistic.update(x, y)
    assert float(statistic.compute()) == pytest.approx(naive(before, after), rel=1e-6)
    assert int(statistic.tokens) == 24


def test_sample_order_does_not_matter() -> None:
    before, after = streams()
    statistic = BlockInfluence()
    for x, y in zip(before.flip(0).split(4), after.flip(0).split(4), strict=True):
        statistic.update(x, y)
    assert float(statistic.compute()) == pytest.approx(naive(before, after), rel=1e-6)


def test_identity_layer_has_no_influence() -> None:
    statistic = BlockInfluence()
    statistic.update(streams()[0], streams()[0])
    assert float(statistic.compute()) == 0.0


def test_reversing_layer_has_influence_two() -> None:
    statistic = BlockInfluence()
    statistic.update(streams()[0], -3 * streams()[0])
    assert float(statistic.compute()) == pytest.approx(2, abs=1e-6)


def test_zero_vectors_count_as_cosine_one_half() -> None:
    before, after = streams()
    before[0, 0] = 0
    after[1, 2] = 0
    before[2, 3] = after[2, 3] = 0
    statistic = BlockInfluence()
    statistic.update(before, after)
    assert float(statistic.compute()) == pytest.approx(naive(before, after), rel=1e-6)


def test_samples_of_weight_zero_are_dropped() -> None:
    before, after = streams()
    statistic = BlockInfluence()
    statistic.update(before, after, torch.tensor([1, 1, 0, 1, 0, 1]))
    kept = [0, 1, 3, 5]
    assert float(statistic.compute()) == pytest.approx(naive(before[kept], after[kept]), rel=1e-6)
    assert int(statistic.tokens) == 16


def test_half_precision_streams_are_multiplied_in_fp32() -> None:
    statistic = BlockInfluence()
    x = torch.full((1, 2, 4), 300.0, dtype=torch.float16)
    statistic.update(x, x)
    assert float(statistic.compute()) == 0.0


def test_non_finite_activations_are_reported_with_the_name() -> None:
    before, after = streams()
    after[0, 0, 0] = math.nan
    statistic = BlockInfluence()
    statistic.update(before, after)
    with pytest.raises(FloatingPointError, match="layer 5"):
        statistic.raise_if_not_finite("layer 5")
