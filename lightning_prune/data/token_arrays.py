"""Ready token ids: `.npy` and `.safetensors` arrays, int64 `[N, L]`, taken as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_prune.errors import UserError


def is_token_array(dataset: str) -> bool:
    """Whether a dataset given by the user is a token array, which needs no tokenizer."""
    return dataset.lower().endswith((".npy", ".safetensors"))


def load_token_array(path: str) -> Tensor:
    """Read token ids without ever unpickling.

    Args:
        path: `.npy`, or `.safetensors` with one tensor (or one of several named `tokens`).

    Returns:
        int64 `[N, L]` with `N >= 1` and `L >= 2`.

    Raises:
        UserError: missing or broken file, another dtype or rank, or an empty array.
    """
    if not Path(path).is_file():
        raise UserError(f"no token array at {path}: check --data.dataset and --data.eval_datasets")
    try:
        tokens = _read_npy(path) if path.lower().endswith(".npy") else _read_safetensors(path)
    except (OSError, EOFError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(
            f"cannot read the token array {path}: {error}; it must be int64 [N, L] saved without pickle "
            f"(--data.dataset, --data.eval_datasets)"
        ) from error
    problem = ""
    if tokens.dtype != torch.int64:
        problem = f"its dtype is {str(tokens.dtype).removeprefix('torch.')}"
    elif tokens.ndim != 2:
        problem = f"it has {tokens.ndim} dimensions"
    elif len(tokens) < 1 or tokens.shape[1] < 2:
        problem = f"its shape is {list(tokens.shape)}, which holds nothing to predict"
    if problem:
        raise UserError(
            f"cannot use the token array {path}: {problem}; it must be int64 [N, L] with N >= 1 and L >= 2 "
            f"(--data.dataset, --data.eval_datasets)"
        )
    return tokens


def _read_npy(path: str) -> Tensor:
    array = np.load(path, allow_pickle=False)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


def _read_safetensors(path: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if len(names) != 1 and "tokens" not in names:
            raise ValueError(f"it holds {len(names)} tensors ({', '.join(names)}) and none is named tokens")
        tensor: Tensor = file.get_tensor(names[0] if len(names) == 1 else "tokens")
    return tensor
