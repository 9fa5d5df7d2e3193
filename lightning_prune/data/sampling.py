"""From one packed token stream to windows `[N, L]`. Pure functions: the same arguments give the same windows."""

import torch
from torch import Tensor

from lightning_prune.support.errors import UserError


def aligned_windows(stream: Tensor, seq_len: int, stride: int | None = None) -> Tensor:
    """Every window that starts at a multiple of `stride`, by default of `seq_len`; int64 `[M, L]`, a view.

    A last partial window is dropped.
    """
    if len(stream) < seq_len:
        return stream.new_empty(0, seq_len)
    return stream.unfold(0, seq_len, stride or seq_len)


def draw_windows(
    stream: Tensor, num_samples: int | None, seq_len: int, stride: int | None = None, seed: int | None = None
) -> Tensor:
    """The first of the aligned windows, or with a seed a random choice among them without replacement.

    Args:
        stream: int64 `[T]`.
        num_samples: N, windows wanted; None for all.
        seq_len: L, tokens per window.
        stride: tokens between the starts of two windows; None for windows that do not overlap.
        seed: of a `torch.Generator` on the CPU; its first `randperm` gives the windows and their order.

    Returns:
        int64 `[N, L]`, in the order drawn, else in that of the text.

    Raises:
        UserError: fewer than N windows fit.
    """
    windows = aligned_windows(stream, seq_len, stride)
    if num_samples is not None and len(windows) < num_samples:
        needed = (num_samples - 1) * (stride or seq_len) + seq_len
        what, options = f"{num_samples} windows of {seq_len}", "--data.seq_len"
        if stride is not None:
            what, options = f"{what} tokens, one every {stride}", f"{options}, --data.stride"
        raise UserError(
            f"the calibration text has {len(stream)} tokens, but {needed} are needed ({what}): "
            f"lower --data.num_samples, {options} or choose a longer text with --data.dataset"
        )
    if seed is None:
        order = torch.arange(len(windows))
    else:
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows.index_select(0, order[:num_samples])


def held_out_samples(tokens: Tensor) -> Tensor:
    """Every eighth sample in the order of their tokens, bool `[N]`: the same ones whatever the order of the set.

    Args:
        tokens: int64 `[N, L]`, the calibration set.
    """
    order = sorted(range(len(tokens)), key=lambda row: tokens[row].tolist())
    chosen = torch.zeros(len(tokens), dtype=torch.bool)
    chosen[torch.tensor(order, dtype=torch.int64)[7::8]] = True
    return chosen
