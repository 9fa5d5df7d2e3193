"""One split of one text corpus as tokens, with where it came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_prune.data.corpora import load_corpus
from lightning_prune.data.tokenization import cached_stream, load_tokenizer, tokenizer_sha256


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
        tokenizer: model folder, hub id, or `demo`.
        cache_dir: where streams are kept between runs.
    """

    def __init__(self, tokenizer: str, cache_dir: Path) -> None:
        self.tokenizer, self.cache_dir = tokenizer, cache_dir
        self.show_progress = False  # of tokenising
        self._loaded: tuple[Any, str] | None = None

    def read(self, dataset: str, split: str, tokens_wanted: int | None = None) -> TokenStream:
        """Fetch and tokenise one split; arguments and errors as in `load_corpus` and `load_tokenizer`."""
        corpus = load_corpus(dataset, split, tokens_wanted)
        if self._loaded is None:
            tokenizer = load_tokenizer(self.tokenizer)
            self._loaded = tokenizer, tokenizer_sha256(tokenizer)
        tokenizer, tokenizer_digest = self._loaded
        text_digest = hashlib.sha256(corpus.text.encode("utf-8")).hexdigest()
        tokens = cached_stream(
            tokenizer, corpus.text, text_digest, tokenizer_digest, self.cache_dir, self.show_progress
        )
        return TokenStream(
            tokens,
            {
                "dataset": corpus.dataset,
                "configuration": corpus.configuration,
                "split": corpus.split,
                "revision": corpus.revision,
                "text_sha256": text_digest,
                "tokenizer_sha256": tokenizer_digest,
            },
        )
