"""From one packed token stream to windows `[N, L]`. Pure functions: the same arguments give the same windows."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.support.errors import UserError


def random_windows(stream: Tensor, num_samples: int, seq_len: int, seed: int) -> Tensor:
    """Seeded choice, without replacement, among the windows that start at multiples of `seq_len`.

    Args:
        stream: int64 `[T]`.
        num_samples: N, windows wanted.
        seq_len: L, tokens per window.
        seed: of a `torch.Generator` on the CPU; its first `randperm` gives the windows and their order.

    Returns:
        int64 `[N, L]`, in the order drawn.

    Raises:
        UserError: fewer than N windows fit.
    """
    _require(stream, num_samples * seq_len, f"{num_samples} windows of {seq_len}", "--data.seq_len")
    windows = aligned_windows(stream, seq_len)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:num_samples]]


def sequential_windows(stream: Tensor, num_samples: int, seq_len: int) -> Tensor:
    """The first N windows that do not overlap, int64 `[N, L]`, in the order of the text.

    Raises:
        UserError: fewer than N windows fit.
    """
    _require(stream, num_samples * seq_len, f"{num_samples} windows of {seq_len}", "--data.seq_len")
    return stream[: num_samples * seq_len].view(num_samples, seq_len).clone()


def sliding_windows(stream: Tensor, num_samples: int, seq_len: int, stride: int) -> Tensor:
    """Window i holds tokens `i * stride … i * stride + L - 1`; int64 `[N, L]`.

    Raises:
        UserError: the last window does not fit.
    """
    what = f"{num_samples} windows of {seq_len} tokens, one every {stride}"
    _require(stream, (num_samples - 1) * stride + seq_len, what, "--data.seq_len, --data.stride")
    return stream.unfold(0, seq_len, stride)[:num_samples].clone()


def aligned_windows(stream: Tensor, seq_len: int) -> Tensor:
    """Every window that starts at a multiple of `seq_len`, int64 `[T // L, L]`; a partial one is dropped."""
    count = len(stream) // seq_len
    return stream[: count * seq_len].view(count, seq_len)


def held_out_samples(tokens: Tensor) -> Tensor:
    """Every eighth sample in the order of their tokens, bool `[N]`: the same ones whatever the order of the set.

    Args:
        tokens: int64 `[N, L]`, the calibration set.
    """
    order = sorted(range(len(tokens)), key=lambda row: tokens[row].tolist())
    chosen = torch.zeros(len(tokens), dtype=torch.bool)
    chosen[torch.tensor(order, dtype=torch.int64)[7::8]] = True
    return chosen


def _require(stream: Tensor, needed: int, what: str, options: str) -> None:
    if len(stream) < needed:
        raise UserError(
            f"the calibration text has {len(stream)} tokens, but {needed} are needed ({what}): "
            f"lower --data.num_samples, {options} or choose a longer text with --data.dataset"
        )
