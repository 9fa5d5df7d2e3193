"""One split of one text corpus as tokens, with where it came from; tokenised once and kept on disk."""

import hashlib
import json
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.data.calibration import fingerprint
from lightning_prune.data.corpora import load_corpus
from lightning_prune.data.tokenization import load_tokenizer, tokenize, tokenizer_sha256, window_start
from lightning_prune.support.files import new_folder, write_json

PROTOCOL = 1  # part of the cache key: raise it when the stream of a text changes


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/lightning_prune``, else ``~/.cache/lightning_prune``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_prune"


class StreamReader:
    """Reads corpora with one tokenizer, which is loaded at the first text: token arrays never need it. ``cache_dir`` is
    where streams are kept between runs; ``bos`` as in ``window_start``."""

    def __init__(self, tokenizer: Any, cache_dir: Path, bos: str = "auto") -> None:
        self.tokenizer, self.cache_dir, self.bos = tokenizer, cache_dir, bos
        self.show_progress = False  # of tokenising

    @cached_property
    def _loaded(self) -> tuple[Any, str]:
        """The tokenizer and its SHA-256."""
        tokenizer = load_tokenizer(self.tokenizer)
        return tokenizer, tokenizer_sha256(tokenizer)

    @property
    def start(self) -> int | None:
        """The token that every window begins with, or None; errors as in ``load_tokenizer`` and ``window_start``."""
        return window_start(self._loaded[0], self.bos)

    def read(
        self, dataset: str, split: str, tokens_wanted: int | None = None, column: str | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Fetch and tokenise one split; arguments and errors as in ``load_corpus`` and ``load_tokenizer``.

        An entry of the cache that is incomplete or does not match its own fingerprint is ignored and written again; a
        folder that cannot be written costs the next run its time, nothing else.

        Returns:
            Packed token ids, int64 ``[T]``; the fields that every manifest takes over: those of ``Corpus`` but the
            text, text_sha256, tokenizer_sha256 and bos.
        """
        corpus = load_corpus(dataset, split, tokens_wanted, column, lambda: self._loaded[0])
        tokenizer, tokenizer_digest = self._loaded
        text_digest = hashlib.sha256(corpus.text.encode("utf-8")).hexdigest()
        digests = {"text_sha256": text_digest, "tokenizer_sha256": tokenizer_digest}
        bos = "none" if self.start is None else "every window"
        provenance = {key: value for key, value in vars(corpus).items() if key != "text"} | digests | {"bos": bos}
        identity = {"protocol": PROTOCOL, **digests}
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8")).hexdigest()
        entry = self.cache_dir / "tokens" / key
        with suppress(OSError, EOFError, ValueError, TypeError):
            manifest = json.loads((entry / "tokens.json").read_text(encoding="utf-8"))
            tokens = torch.from_numpy(np.load(entry / "tokens.npy", allow_pickle=False))
            if manifest == {**identity, "fingerprint": fingerprint(tokens)}:
                return tokens, provenance
        tokens = tokenize(tokenizer, corpus.text, self.show_progress)
        with suppress(OSError), new_folder(entry) as unfinished:
            np.save(unfinished / "tokens.npy", tokens.numpy().astype("<i8", copy=False))
            write_json(unfinished / "tokens.json", {**identity, "fingerprint": fingerprint(tokens)})
        return tokens, provenance
