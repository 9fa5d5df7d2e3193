"""Ready token ids: `.npy` and `.safetensors` arrays, int64 `[N, L]`, taken as they are."""

from __future__ import annotations

from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_prune.support.errors import UserError
from lightning_prune.support.regular_files import exists, require_regular

_HEADER_ERRORS = (SyntaxError, TokenError)  # numpy reads the header as a Python literal


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
    if not exists(Path(path)):
        raise UserError(f"no token array at {path}: check --data.dataset and --data.eval_datasets")
    require_regular(Path(path), "--data.dataset and --data.eval_datasets")
    try:
        tokens = _read_npy(path) if path.lower().endswith(".npy") else _read_safetensors(path)
    except (OSError, EOFError, ValueError, TypeError, OverflowError, *_HEADER_ERRORS, SafetensorError) as error:
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


def first_part(
    path: str, split: str | None, num_samples: int | None, seq_len: int | None, length_option: str = "seq_len"
) -> tuple[Tensor, dict[str, Any]]:
    """The first rows of an array and their first tokens, and what a manifest says of where they came from.

    Args:
        path: see `load_token_array`.
        split: what the user wrote after a colon; an array has none.
        num_samples: rows wanted; None for all.
        seq_len: tokens wanted of each row; None for all.
        length_option: the option that asks for them.

    Returns:
        int64 `[num_samples, seq_len]`; the fields of `TokenStream.provenance`, of which it knows dataset and split.

    Raises:
        UserError: as `load_token_array`; or a split, or more is wanted than is there.
    """
    if split is not None:
        raise UserError(f"the token array {path} has no splits: leave out :{split}")
    tokens = load_token_array(path)
    rows, length = tokens.shape
    for option, wanted, there in (("num_samples", num_samples, rows), (length_option, seq_len, length)):
        if wanted is not None and wanted > there:
            raise UserError(
                f"--data.{option}: found {wanted}, but the token array {path} has {rows} rows of {length} tokens: "
                f"ask for at most {there}, or leave it out to take all"
            )
    unknown = dict.fromkeys(("configuration", "revision", "text_sha256", "tokenizer_sha256"))
    return tokens[:num_samples, :seq_len].contiguous(), {**unknown, "dataset": path, "split": "all"}


def _read_npy(path: str) -> Tensor:
    # Mapped, so that a shape in the header is held against the file's size before anything is allocated.
    array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"its dtype is {array.dtype}")
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _read_safetensors(path: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if len(names) != 1 and "tokens" not in names:
            raise ValueError(f"it holds {len(names)} tensors ({', '.join(names)}) and none is named tokens")
        tensor: Tensor = file.get_tensor(names[0] if len(names) == 1 else "tokens")
    return tensor
