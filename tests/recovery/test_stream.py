"""The order of training windows."""

import torch

from lightning_prune.recovery.stream import ShuffledWindows


def test_every_window_comes_once_before_any_comes_again() -> None:
    stream = ShuffledWindows(torch.arange(10).view(10, 1), 4, seed=0)
    reader = iter(stream)
    rounds = [[int(token) for _ in range(len(stream)) for token in next(reader)] for _ in range(3)]
    assert all(sorted(one) == list(range(10)) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_a_stream_goes_on_where_another_stopped_whatever_the_position() -> None:
    tokens = torch.arange(10).view(10, 1)
    whole = iter(ShuffledWindows(tokens, 4, seed=5))
    batches = [next(whole).tolist() for _ in range(9)]
    for stopped in range(9):
        other = ShuffledWindows(tokens, 4, seed=5)
        other.load_state_dict({"position": stopped})
        reader = iter(other)
        assert [next(reader).tolist() for _ in range(stopped, 9)] == batches[stopped:]
