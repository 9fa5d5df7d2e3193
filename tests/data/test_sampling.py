import pytest
import torch

from lightning_prune.data.sampling import aligned_windows, random_windows, sequential_windows, sliding_windows
from lightning_prune.support.errors import UserError

STREAM = torch.arange(103)


def test_random_windows_are_aligned_distinct_and_follow_the_seeded_permutation() -> None:
    windows = random_windows(STREAM, 6, 10, seed=3)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()[:6]
    assert windows.tolist() == [list(range(10 * i, 10 * i + 10)) for i in order]


def test_random_windows_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = random_windows(STREAM, 6, 10, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, random_windows(STREAM, 6, 10, seed=3))
    assert not torch.equal(first, random_windows(STREAM, 6, 10, seed=4))


def test_random_takes_every_window_when_all_are_wanted() -> None:
    assert sorted(random_windows(STREAM, 10, 10, seed=0)[:, 0].tolist()) == list(range(0, 100, 10))


def test_sequential_windows_are_the_first_ones_in_order() -> None:
    assert sequential_windows(STREAM, 3, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("stride", [1, 3, 10, 20])
def test_sliding_window_i_starts_at_i_times_stride(stride: int) -> None:
    windows = sliding_windows(STREAM, 4, 10, stride)
    assert windows.tolist() == [[i * stride + j for j in range(10)] for i in range(4)]


def test_windows_do_not_share_memory_with_the_stream() -> None:
    stream = STREAM.clone()
    for windows in (
        random_windows(stream, 2, 5, 0),
        sequential_windows(stream, 2, 5),
        sliding_windows(stream, 2, 5, 1),
    ):
        windows.fill_(-1)
    assert torch.equal(stream, STREAM)


def test_a_last_partial_window_is_dropped() -> None:
    assert aligned_windows(STREAM, 10).shape == (10, 10)
    assert aligned_windows(STREAM, 104).shape == (0, 104)


@pytest.mark.parametrize(
    ("draw", "needed", "words"),
    [
        (lambda: random_windows(STREAM, 11, 10, 0), 110, ["--data.num_samples", "--data.seq_len", "--data.dataset"]),
        (lambda: sequential_windows(STREAM, 11, 10), 110, ["--data.num_samples", "--data.seq_len", "--data.dataset"]),
        (lambda: sliding_windows(STREAM, 11, 10, 10), 110, ["--data.num_samples", "--data.stride", "--data.dataset"]),
    ],
)
def test_too_little_text_says_how_much_there_is_and_is_needed(draw, needed, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError) as error:
        draw()
    for word in ["103 tokens", str(needed), *words]:
        assert word in str(error.value)


def test_sliding_needs_no_more_than_its_last_window() -> None:
    assert len(sliding_windows(STREAM, 94, 10, 1)) == 94
    with pytest.raises(UserError, match="104"):
        sliding_windows(STREAM, 95, 10, 1)
