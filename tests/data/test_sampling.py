from typing import Any

import pytest
import torch

from lightning_prune.data.sampling import aligned_windows, draw_windows
from lightning_prune.support.errors import UserError

STREAM = torch.arange(103)


@pytest.mark.parametrize("stride", [None, 1, 3, 10, 20])
def test_without_a_seed_window_i_starts_at_i_times_the_stride(stride: int | None) -> None:
    stream = STREAM.clone()
    windows = draw_windows(stream, 4, 10, stride)
    assert windows.tolist() == [[i * (stride or 10) + j for j in range(10)] for i in range(4)]
    assert windows.is_contiguous()
    windows.fill_(-1)
    assert torch.equal(stream, STREAM)


def test_a_last_partial_window_is_dropped() -> None:
    assert torch.equal(aligned_windows(STREAM, 10), STREAM[:100].view(10, 10))
    assert torch.equal(draw_windows(STREAM, None, 10), STREAM[:100].view(10, 10))
    assert aligned_windows(STREAM, 104).shape == (0, 104)


@pytest.mark.parametrize(
    ("fits", "options", "needed"),
    [(10, {"seed": 0}, 110), (10, {}, 110), (10, {"stride": 10}, 110), (94, {"stride": 1}, 104)],
)
def test_too_little_text_says_how_much_there_is_and_is_needed(fits: int, options: dict[str, Any], needed: int) -> None:
    starts = draw_windows(STREAM, fits, 10, **options)[:, 0].tolist()
    assert len(set(starts)) == fits  # also without replacement
    with pytest.raises(UserError) as error:
        draw_windows(STREAM, fits + 1, 10, **options)
    for word in ["103 tokens", f"{needed} are needed", "--data.num_samples", "--data.seq_len", "--data.dataset"]:
        assert word in str(error.value)
    assert ("--data.stride" in str(error.value)) == ("stride" in options)
