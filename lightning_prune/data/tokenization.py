"""Text to one packed token stream: what the tokenizer gives for the whole text in one call, without special tokens."""

import hashlib
import json
import re
import tempfile
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from lightning_prune.demo import demo_model_path
from lightning_prune.support.errors import UserError, first_line
from lightning_prune.support.progress import Progress
from lightning_prune.support.quiet import quiet_transformers
from lightning_prune.support.regular_files import from_home

TOKENISING = "tokenising"
BOS = ("auto", "never", "always")
PIECE = 1 << 16  # characters
CONTEXT = 256  # characters on either side of a cut that must not notice it
CANDIDATES = 32  # white-space positions tried before the rest is taken in one piece


def load_tokenizer(source: Any) -> Any:
    """The tokenizer of a model folder or hub id (UserError where there is none, or one without words); ``demo`` is the
    embedded model's; a tokenizer is returned as it is."""
    if not isinstance(source, str | Path):
        return source
    try:
        with quiet_transformers():
            folder = demo_model_path() if source == "demo" else from_home(str(source), "--data.tokenizer")
            tokenizer = AutoTokenizer.from_pretrained(folder)
        # For some families transformers makes one of special tokens alone where the folder has no files of one.
        if tokenizer.get_vocab().keys() <= {*tokenizer.all_special_tokens}:
            raise ValueError("its vocabulary has no tokens but special ones")
        return tokenizer
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … for one and the same mistake
        raise UserError(
            f"no usable tokenizer in '{source}' ({first_line(error)}), and a text dataset needs one. Add the tokenizer "
            "files (tokenizer.json, tokenizer_config.json) to the model folder, choose another with --data.tokenizer, "
            "or give a token array (.npy or .safetensors, int64 [N, L]) with --data.dataset and --data.eval_datasets."
        ) from error


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of the ``tokenizer.json`` serialisation; without one, of the vocabulary files and the added tokens."""
    if getattr(tokenizer, "is_fast", False):
        return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode("utf-8")).hexdigest()
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_added_vocab().items())).encode("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(Path(name) for name in tokenizer.save_vocabulary(folder)):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def window_start(tokenizer: Any, bos: str = "auto") -> int | None:
    """The token that every window of text begins with, or None: ``bos`` is ``auto`` for the beginning-of-sequence token
    where the tokenizer puts it before a text by itself, ``always`` for it in any case, ``never`` for none.

    Raises:
        UserError: ``always``, and the tokenizer has no such token; or another word.
    """
    if bos not in BOS:
        raise UserError(f"--data.bos: found {bos!r}; allowed: {', '.join(BOS)}.")
    token: int | None = getattr(tokenizer, "bos_token_id", None)
    if bos == "always" and token is None:
        raise UserError("--data.bos always: the tokenizer has no beginning-of-sequence token. Choose auto or never.")
    if bos == "never" or token is None:
        return None
    return token if bos == "always" or tokenizer("a")["input_ids"][:1] == [token] else None


def tokenize(tokenizer: Any, text: str, progress: bool = False) -> Tensor:
    """The packed stream of a text: int64 ``[T]``, no special tokens, no padding. A long one is tokenised piece by
    piece, so that one sees how far it is, and memory stays small."""
    stream, start = [np.empty(0, np.int64)], 0
    with closing(Progress(shown=progress)) as shown:
        shown.expect(TOKENISING, len(text))
        while start < len(text):
            end = _safe_cut(tokenizer, text, start + PIECE)
            stream.append(np.asarray(_ids(tokenizer, text[start:end]), dtype=np.int64))
            shown.advance(TOKENISING, end - start)
            start = end
        shown.finish(TOKENISING)
    return torch.from_numpy(np.concatenate(stream))


def _safe_cut(tokenizer: Any, text: str, begin: int) -> int:
    """The first white space from ``begin`` on where the text around it gives the same ids with a cut as without. Where
    there is none (one kind of tokenizer marks the start of every text it is given), the end of the text."""
    for space in islice(re.compile(r"\s").finditer(text, begin), CANDIDATES):
        for cut in (space.start(), space.end()):
            left, right = text[cut - CONTEXT : cut], text[cut : cut + CONTEXT]
            if _ids(tokenizer, left) + _ids(tokenizer, right) == _ids(tokenizer, left + right):
                return cut
    return len(text)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids
