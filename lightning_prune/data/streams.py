"""One split of one text corpus as tokens, with where it came from; tokenised once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.data.calibration import fingerprint
from lightning_prune.data.corpora import load_corpus
from lightning_prune.data.tokenization import load_tokenizer, tokenize, tokenizer_sha256
from lightning_prune.support.files import new_folder, write_json

PROTOCOL = 1  # part of the cache key: raise it when the stream of a text changes


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/lightning_prune`, else `~/.cache/lightning_prune`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_prune"


@dataclass(frozen=True)
class TokenStream:
    """Packed token ids, int64 `[T]`, and the fields that every manifest takes over.

    `provenance` has dataset, configuration, split, revision, text_sha256 and tokenizer_sha256.
    """

    tokens: Tensor
    provenance: dict[str, Any]


class StreamReader:
    """Reads corpora with one tokenizer, which is loaded at the first text: token arrays never need it.

    Args:
        tokenizer: a tokenizer, or the model folder, hub id, or `demo` to load it from.
        cache_dir: where streams are kept between runs.
    """

    def __init__(self, tokenizer: Any, cache_dir: Path) -> None:
        self.tokenizer, self.cache_dir = tokenizer, cache_dir
        self.show_progress = False  # of tokenising
        self._digest = ""

    def read(self, dataset: str, split: str, tokens_wanted: int | None = None) -> TokenStream:
        """Fetch and tokenise one split; arguments and errors as in `load_corpus` and `load_tokenizer`.

        An entry of the cache that is incomplete or does not match its own fingerprint is ignored and written again; a
        folder that cannot be written costs the next run its time, nothing else.
        """
        corpus = load_corpus(dataset, split, tokens_wanted)
        if not self._digest:
            if isinstance(self.tokenizer, str):
                self.tokenizer = load_tokenizer(self.tokenizer)
            self._digest = tokenizer_sha256(self.tokenizer)
        digests = {
            "text_sha256": hashlib.sha256(corpus.text.encode("utf-8")).hexdigest(),
            "tokenizer_sha256": self._digest,
        }
        provenance = {key: value for key, value in vars(corpus).items() if key != "text"} | digests
        identity = {"protocol": PROTOCOL, **digests}
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8")).hexdigest()
        entry = self.cache_dir / "tokens" / key
        with suppress(OSError, EOFError, ValueError, TypeError):
            manifest = json.loads((entry / "tokens.json").read_text(encoding="utf-8"))
            tokens = torch.from_numpy(np.load(entry / "tokens.npy", allow_pickle=False))
            if manifest == {**identity, "fingerprint": fingerprint(tokens)}:
                return TokenStream(tokens, provenance)
        tokens = tokenize(self.tokenizer, corpus.text, self.show_progress)
        with suppress(OSError), new_folder(entry) as unfinished:
            np.save(unfinished / "tokens.npy", tokens.numpy().astype("<i8", copy=False))
            write_json(unfinished / "tokens.json", {**identity, "fingerprint": fingerprint(tokens)})
        return TokenStream(tokens, provenance)
