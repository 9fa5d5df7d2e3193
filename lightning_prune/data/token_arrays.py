"""Ready token ids: ``.npy`` and ``.safetensors`` arrays, int64 ``[N, L]``, taken as they are."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_prune.support.errors import UserError
from lightning_prune.support.regular_files import require_regular

OPTIONS = "--data.dataset and --data.eval_datasets"


def is_token_array(dataset: str) -> bool:
    """Whether a dataset given by the user is a token array, which needs no tokenizer."""
    return dataset.lower().endswith((".npy", ".safetensors"))


def load_token_array(path: str) -> Tensor:
    """Token ids int64 ``[N, L]``, ``N >= 1`` and ``L >= 2``, of a ``.npy`` file or of ``.safetensors`` with one tensor
    (or one of several named ``tokens``), read without ever unpickling.

    Raises:
        UserError: missing or broken file, another dtype or rank, or an empty array.
    """
    require_regular(Path(path), OPTIONS)
    try:
        if path.lower().endswith(".npy"):
            # Mapped, so that a shape in the header is compared with the file's size before anything is allocated.
            array = np.lib.format.open_memmap(path, mode="r")
            tokens = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
        else:
            tensors = load_file(path)
            if len(tensors) != 1 and "tokens" not in tensors:
                raise ValueError(f"it holds {len(tensors)} tensors ({', '.join(tensors)}) and none is named tokens")
            tokens = tensors.get("tokens", next(iter(tensors.values())))
    except Exception as error:  # numpy reads a header as a Python literal, which may fail in any way
        raise UserError(
            f"{OPTIONS}: cannot read the token array {path}: {error}. Give int64 [N, L] saved without pickle."
        ) from error
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or len(tokens) < 1 or tokens.shape[1] < 2:
        raise UserError(
            f"{OPTIONS}: cannot use the token array {path}: it is {str(tokens.dtype).removeprefix('torch.')} "
            f"{list(tokens.shape)}; it must be int64 [N, L] with N >= 1 and L >= 2."
        )
    return tokens


def first_part(
    path: str, split: str | None, num_samples: int | None, seq_len: int | None, length_option: str = "seq_len"
) -> tuple[Tensor, dict[str, Any]]:
    """The first ``num_samples`` rows of an array and their first ``seq_len`` tokens (None for all), and the array's
    facts, with the keys of ``StreamReader.read``.

    Raises:
        UserError: as ``load_token_array``; a ``split``, which an array has none of; more is wanted than is there, which
            names ``length_option`` for ``seq_len``.
    """
    if split is not None:
        raise UserError(f"the token array {path} has no splits. Leave out :{split}.")
    tokens = load_token_array(path)
    rows, length = tokens.shape
    for option, wanted, there in (("num_samples", num_samples, rows), (length_option, seq_len, length)):
        if wanted is not None and wanted > there:
            raise UserError(
                f"--data.{option}: found {wanted}, but the token array {path} has {rows} rows of {length} tokens. "
                f"Give at most {there}, or leave it out to take all."
            )
    unknown = dict.fromkeys(("configuration", "revision", "text_sha256", "tokenizer_sha256"))
    return tokens[:num_samples, :seq_len].contiguous(), {**unknown, "dataset": path, "split": "all", "bos": "none"}
