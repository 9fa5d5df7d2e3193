"""Text to one packed token stream, tokenised once and kept on disk.

The stream is what the tokenizer gives for the whole text in one call, without special tokens. Long texts are
tokenised piece by piece, so that one sees how far it is, and memory stays small; a cut is made only at white
space, and only where tokenising the 256 characters on either side gives the same ids with the cut as without.
A tokenizer that has no such place (one that marks the start of every text it is given) gets the rest in one piece.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from lightning_prune.data.calibration import fingerprint
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import new_folder, write_json
from lightning_prune.support.progress import Progress
from lightning_prune.support.quiet import quiet_transformers
from lightning_prune.support.regular_files import from_home

TOKENISING = "tokenising"
PROTOCOL = 1  # part of the cache key: raise it when the stream of a text changes
PIECE = 1 << 16  # characters
CONTEXT = 256  # characters on either side of a cut that must not notice it
CANDIDATES = 32  # white-space positions tried before the rest is taken in one piece


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or hub id; `demo` is the embedded model's.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        if name == "demo":
            from lightning_prune.demo import demo_model_path

            name = str(demo_model_path())
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(from_home(name, "--data.tokenizer"))
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … for one and the same mistake
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"no usable tokenizer in {name!r} ({lines[0]}), and a text dataset needs one: add the tokenizer files "
            f"(tokenizer.json, tokenizer_config.json) to the model folder, choose another with --data.tokenizer, or "
            f"give a token array (.npy or .safetensors, int64 [N, L]) with --data.dataset and --data.eval_datasets"
        ) from error


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of the `tokenizer.json` serialisation; without one, of the vocabulary files and the added tokens."""
    if getattr(tokenizer, "is_fast", False):
        return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode("utf-8")).hexdigest()
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_added_vocab().items())).encode("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(Path(name) for name in tokenizer.save_vocabulary(folder)):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def tokenize(tokenizer: Any, text: str, progress: bool = False) -> Tensor:
    """The packed stream of a text: int64 `[T]`, no special tokens, no padding.

    Args:
        tokenizer: a `transformers` tokenizer.
        text: any length.
        progress: show how far it is.
    """
    stream: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    with closing(Progress(shown=progress)) as shown:
        shown.expect(TOKENISING, len(text))
        for piece in _pieces(tokenizer, text):
            stream.append(np.asarray(_ids(tokenizer, piece), dtype=np.int64))
            shown.advance(TOKENISING, len(piece))
        shown.finish(TOKENISING)
    return torch.from_numpy(np.concatenate(stream) if stream else np.empty(0, np.int64))


def cached_stream(
    tokenizer: Any, text: str, text_digest: str, tokenizer_digest: str, folder: Path, progress: bool = False
) -> Tensor:
    """`tokenize`, kept in `folder` under the SHA-256 of the text and of the tokenizer and the protocol.

    An entry that is incomplete or does not match its own fingerprint is ignored and written again; a folder that
    cannot be written costs the next run its time, nothing else.
    """
    identity = {"protocol": PROTOCOL, "text_sha256": text_digest, "tokenizer_sha256": tokenizer_digest}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8")).hexdigest()
    entry = folder / "tokens" / key
    stream = _read_entry(entry, identity)
    if stream is None:
        stream = tokenize(tokenizer, text, progress)
        try:
            with new_folder(entry) as unfinished:
                np.save(unfinished / "tokens.npy", stream.numpy().astype("<i8", copy=False))
                write_json(unfinished / "tokens.json", {**identity, "fingerprint": fingerprint(stream)})
        except OSError:
            pass
    return stream


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/lightning_prune`, else `~/.cache/lightning_prune`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_prune"


def _read_entry(entry: Path, identity: dict[str, Any]) -> Tensor | None:
    try:
        manifest = json.loads((entry / "tokens.json").read_text(encoding="utf-8"))
        stream = torch.from_numpy(np.load(entry / "tokens.npy", allow_pickle=False))
        return stream if manifest == {**identity, "fingerprint": fingerprint(stream)} else None
    except (OSError, EOFError, ValueError, TypeError):
        return None


def _pieces(tokenizer: Any, text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        cut = _safe_cut(tokenizer, text, start + PIECE)
        if cut is None:
            break
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _safe_cut(tokenizer: Any, text: str, begin: int) -> int | None:
    for tried, space in enumerate(re.compile(r"\s").finditer(text, begin)):
        if tried == CANDIDATES:
            break
        for cut in (space.start(), space.end()):
            left, right = text[cut - CONTEXT : cut], text[cut : cut + CONTEXT]
            if _ids(tokenizer, left) + _ids(tokenizer, right) == _ids(tokenizer, left + right):
                return cut
    return None


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids
