"""Text or token ids of one's own as the calibration set of a run."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.data.corpora import load_corpus
from lightning_prune.data.sampling import draw_windows
from lightning_prune.data.tokenization import load_tokenizer, tokenize
from lightning_prune.support.errors import UserError


def calibration_set(
    data: Any,
    tokenizer: Any = None,
    num_samples: int = 128,
    seq_len: int = 128,
    seed: int = 0,
    column: str = "text",
) -> Tensor:
    """Token ids int64 ``[num_samples, seq_len]``, drawn as the command line draws them.

    Args:
        data: a text, a list of texts, a ``Path`` (a file as ``--data.dataset`` takes it, whole), a ``datasets.Dataset``
            with a text column, or token ids: ``[T]`` to draw windows from, or ``[N, L]``, whose rows are taken as they
            are.
        tokenizer: of the model, or its folder or hub id; only token ids need none.
        num_samples: N; this and the next two are the unified setting by default, and not read for ``[N, L]``.
        seq_len: L.
        seed: of the draw.
        column: of a dataset.

    Raises:
        UserError: too little text, no tokenizer, the name of a file as a str, or data of another kind.
    """
    ids = _token_ids(data)
    if ids is not None and ids.dim() == 2:
        return ids
    if ids is None:
        if tokenizer is None:
            raise UserError("tokenizer: none given; texts need that of the model (the object, its folder or hub id).")
        ids = tokenize(load_tokenizer(tokenizer), "\n\n".join(_texts(data, column)))
    return draw_windows(ids, num_samples, seq_len, seed=seed)


def as_dataset(calibration: Any, folder: Path, name: str) -> str | None:
    """What ``--data.dataset`` takes: a name as it is, token ids as a file in ``folder``; None stays the default.

    Raises:
        UserError: token ids that are not ``[N, L]``, or something else.
    """
    if calibration is None or isinstance(calibration, str | Path):
        return None if calibration is None else str(calibration)
    ids = _token_ids(calibration)
    if ids is None or ids.dim() != 2:
        raise UserError(
            f"{name}: give the name of a corpus, a file, or token ids [N, L] as calibration_set makes them; found "
            f"{type(calibration).__name__}."
        )
    path = folder / f"{name}.npy"
    np.save(path, ids.numpy())
    return str(path)


def _token_ids(data: Any) -> Tensor | None:
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(data)
    if not isinstance(data, Tensor):
        return None
    if data.is_floating_point() or data.is_complex() or data.dim() not in (1, 2):
        raise UserError(f"token ids are integers [T] or [N, L]; found {data.dtype} of shape {list(data.shape)}.")
    return data.long().cpu()


def _texts(data: Any, column: str) -> list[str]:
    if isinstance(data, Path):
        return [load_corpus(str(data), "all").text]
    if isinstance(data, str):
        if os.path.isfile(data):
            raise UserError(f"calibration data: '{data}' is a file; pathlib.Path('{data}') is read, a str is text.")
        return [data]
    if hasattr(data, "column_names"):
        if column not in data.column_names:
            raise UserError(f"column: the dataset has no '{column}'. Columns: {', '.join(data.column_names)}.")
        data = data[column]
    if isinstance(data, Iterable) and not isinstance(data, Mapping):
        texts = list(data)
        if texts and all(isinstance(text, str) for text in texts):
            return texts
    raise UserError(
        f"calibration data: give text, a list of texts, a Path, a Dataset or token ids; found {type(data).__name__}."
    )
