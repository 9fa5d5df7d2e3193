"""From one packed token stream to windows ``[N, L]``. Pure functions: the same arguments give the same windows."""

import torch
from torch import Tensor

from lightning_prune.support.errors import UserError


def window_starts(stream: Tensor, seq_len: int, stride: int | None, bos: int | None) -> Tensor:
    """Where windows begin: every multiple of ``stride``, by default of the tokens that a window takes; int64 ``[M]``.

    A last partial window is dropped. With ``bos``, a window takes ``seq_len - 1`` tokens of the stream after it; one
    whose first token is that anyway (as chat templates write it) takes ``seq_len``, so that it is never there twice.
    """
    body = seq_len if bos is None else seq_len - 1
    starts = torch.arange(0, max(0, len(stream) - body + 1), stride or body)
    if bos is not None:
        starts = starts[(stream[starts] != bos) | (starts + seq_len <= len(stream))]
    return starts


def cut(stream: Tensor, starts: Tensor, seq_len: int, bos: int | None) -> Tensor:
    """The windows at ``starts``, int64 ``[N, L]``; see ``window_starts``."""
    if len(starts) == 0:
        return stream.new_empty(0, seq_len)
    if bos is None:
        return stream.unfold(0, seq_len, 1)[starts]
    windows = torch.cat([stream.new_full((len(starts), 1), bos), stream.unfold(0, seq_len - 1, 1)[starts]], dim=1)
    if (own := stream[starts] == bos).any():
        windows[own] = stream.unfold(0, seq_len, 1)[starts[own]]
    return windows


def aligned_windows(stream: Tensor, seq_len: int, bos: int | None = None) -> Tensor:
    """All windows that do not overlap, int64 ``[M, L]``; see ``window_starts``."""
    return draw_windows(stream, None, seq_len, bos=bos)


def draw_windows(
    stream: Tensor,
    num_samples: int | None,
    seq_len: int,
    stride: int | None = None,
    seed: int | None = None,
    bos: int | None = None,
) -> Tensor:
    """The first ``num_samples`` windows (None: all) of a stream int64 ``[T]``, see ``window_starts``: int64 ``[N, L]``.

    With a seed they are a random choice without replacement: the first ``randperm`` of a ``torch.Generator`` on the CPU
    gives the windows and their order.

    Raises:
        UserError: fewer fit.
    """
    starts = window_starts(stream, seq_len, stride, bos)
    if num_samples is not None and len(starts) < num_samples:
        body = seq_len if bos is None else seq_len - 1
        needed = (num_samples - 1) * (stride or body) + body
        what = f"{num_samples} windows of {seq_len}{'' if bos is None else ', bos included'}"
        options = "--data.seq_len"
        if stride is not None:
            what, options = f"{what} tokens, one every {stride}", f"{options}, --data.stride"
        raise UserError(
            f"The calibration text has {len(stream)} tokens, but {needed} are needed ({what}). "
            f"Lower --data.num_samples, {options} or choose a longer text with --data.dataset."
        )
    if seed is not None:
        starts = starts[torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))]
    return cut(stream, starts[:num_samples], seq_len, bos)


def held_out_samples(tokens: Tensor) -> Tensor:
    """Mask of every eighth sample of a calibration set int64 ``[N, L]``, in the order of their tokens, bool ``[N]``:
    the same whatever the order of the set."""
    order = sorted(range(len(tokens)), key=lambda row: tokens[row].tolist())
    chosen = torch.zeros(len(tokens), dtype=torch.bool)
    chosen[torch.tensor(order, dtype=torch.int64)[7::8]] = True
    return chosen
