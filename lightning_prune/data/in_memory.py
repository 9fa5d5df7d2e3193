"""Text or token ids of one's own as the calibration set of a run."""

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.data.corpora import NAMES, calibration_split, load_corpus, split_spec
from lightning_prune.data.local_files import rows_of
from lightning_prune.data.rows import Chat, check_characters, documents, is_turns
from lightning_prune.data.sampling import draw_windows
from lightning_prune.data.tokenization import load_tokenizer, tokenize, window_start
from lightning_prune.support.errors import UserError

LONGEST_NAME = 256  # characters of one word that is a misspelt name and not a text


def calibration_set(
    data: Any,
    tokenizer: Any = None,
    num_samples: int = 128,
    seq_len: int = 128,
    seed: int = 0,
    column: str | None = None,
    bos: str = "auto",
) -> Tensor:
    """Token ids int64 ``[num_samples, seq_len]``, drawn as the command line draws them.

    Args:
        data: a corpus, file or folder as ``--data.dataset`` takes it; a str that names none is the text itself. Or a
            list of texts, a ``datasets.Dataset`` or a list of rows with text or chats, a list of chats, or token ids:
            ``[T]`` to draw windows from, or ``[N, L]``, whose rows are taken as they are.
        tokenizer: of the model, or its folder or hub id; only token ids need none.
        num_samples: N; this and the next two are the unified setting by default, and not read for ``[N, L]``.
        seq_len: L.
        seed: of the draw.
        column: of a table; None takes the one that is clearly the text or the chat.
        bos: as ``--data.bos``; token ids get none.

    Raises:
        UserError: too little text, no tokenizer, or data of another kind.
    """
    ids, start = _token_ids(data), None
    if ids is not None and ids.dim() == 2:
        return ids
    if ids is None:
        if tokenizer is None:
            raise UserError("tokenizer: found none; texts need one. Give the model's: the object, folder or hub id.")
        loaded = load_tokenizer(tokenizer)
        text = _text(data, column, loaded, num_samples * seq_len)
        check_characters(text, "calibration data")
        ids, start = tokenize(loaded, text), window_start(loaded, bos)
    return draw_windows(ids, num_samples, seq_len, seed=seed, bos=start)


def as_dataset(calibration: Any, folder: Path, name: str) -> list[str] | str | None:
    """The value for ``--data.dataset``: a name as it is, token ids ``[N, L]`` as a file in ``folder``; None stays the
    default, and UserError for anything else."""
    if isinstance(calibration, list) and all(isinstance(part, str) for part in calibration):
        if not all(":" in part and len(part) < LONGEST_NAME for part in calibration):
            raise UserError(
                f"{name}: found a list of {len(calibration)} str. A list is a mixture of files and their shares, "
                "such as ['a.txt:0.5', 'b.txt:0.5']; of texts, give calibration_set(texts, tokenizer=...)."
            )
        return calibration
    if calibration is None or isinstance(calibration, str | Path):
        return None if calibration is None else str(calibration)
    ids = _token_ids(calibration)
    if ids is None or ids.dim() != 2:
        raise UserError(
            f"{name}: found {type(calibration).__name__}. Give the name of a corpus, a file, or token ids [N, L] as "
            "calibration_set makes them."
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
        raise UserError(f"token ids: found {data.dtype} of shape {list(data.shape)}. Give integers [T] or [N, L].")
    return data.long().cpu()


def _text(data: Any, column: str | None, tokenizer: Any, tokens_wanted: int) -> str:
    if isinstance(data, str) and data.partition(":")[0] not in NAMES and not os.path.exists(data):
        if len(data) < LONGEST_NAME and not data[-1:].isspace() and len(data.split()) == 1:
            raise UserError(
                f"calibration data: no file or folder '{data}', and no corpus; those are {', '.join(NAMES)}."
            )
        return data  # patterns of files are not looked for: a text may hold an asterisk
    if isinstance(data, str | Path):
        name, split = split_spec(str(data))
        return load_corpus(name, split or calibration_split(name), tokens_wanted, column, lambda: tokenizer).text
    chat = Chat(lambda: tokenizer)
    if hasattr(data, "column_names"):
        return chat.joined(list(documents("the dataset", partial(rows_of, data), column, chat)))
    rows = list(data) if isinstance(data, Iterable) and not isinstance(data, Mapping) else []
    if rows and all(isinstance(row, str) for row in rows):
        return chat.joined(rows)
    if all(is_turns(row) for row in rows):
        rows = [{"messages": row} for row in rows]
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise UserError(
            f"calibration data: found {type(data).__name__}. Give a corpus, a file, text, a list of texts, rows or "
            "chats, a Dataset or token ids."
        )
    return chat.joined(list(documents("the dataset", lambda _: iter(rows), column, chat)))
