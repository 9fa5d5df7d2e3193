"""Text to tokens, and the streams that are kept between runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_prune.data import streams, tokenization
from lightning_prune.data.streams import StreamReader
from lightning_prune.data.tokenization import load_tokenizer, tokenize, tokenizer_sha256
from lightning_prune.support.errors import UserError
from tests.data.conftest import make_text


@pytest.fixture
def tokenizer(tokenizer_folder: str) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def with_pre_tokenizer(pre_tokenizer: Any) -> Any:
    raw = Tokenizer(models.BPE(unk_token="?"))
    raw.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["?"], show_progress=False)
    raw.train_from_iterator([make_text(500)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def reference(tokenizer: Any, text: str) -> list[int]:
    """One call of the underlying library for the whole text."""
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


METASPACE = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
PIECES = {
    **{repr(gap): (None, make_text(2000).replace("\n", gap), True) for gap in ("\n", " \n\n \n", "   ", "\n\n\n\t")},
    # Like Llama 2's, it puts a word mark before whatever text it is given: every cut would add one.
    "marks the start": (METASPACE, "x" + make_text(600), False),
    "no white space": (None, "ab" * 2000, False),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_join_to_the_tokenisation_of_the_whole_text(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "PIECE", 700)
    monkeypatch.setattr(tokenization, "CONTEXT", 64)
    pre_tokenizer, text, in_pieces = PIECES[name]
    used = tokenizer if pre_tokenizer is None else with_pre_tokenizer(pre_tokenizer)
    lengths: list[int] = []

    def counted(text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return used(text, **options)

    assert tokenize(counted, text).tolist() == reference(used, text)
    assert (max(lengths) < 1000) == in_pieces


class Slow:
    """A tokenizer without a `tokenizer.json`."""

    def __init__(self, vocabulary: bytes, added: dict[str, int]) -> None:
        self.vocabulary, self.get_added_vocab = vocabulary, added.copy

    def save_vocabulary(self, folder: str) -> tuple[str]:
        (Path(folder) / "vocab.txt").write_bytes(self.vocabulary)
        return (str(Path(folder) / "vocab.txt"),)


def test_tokenizer_sha256_tells_tokenizers_apart_and_not_their_uses(tokenizer: Any) -> None:
    """What it is the digest of is in ``test_datamodule.py``."""
    variants = [tokenizer, with_pre_tokenizer(pre_tokenizers.Whitespace())]
    variants += [Slow(b"a", {}), Slow(b"b", {}), Slow(b"a", {"<x>": 3})]
    digests = [tokenizer_sha256(variant) for variant in variants]
    assert len(set(digests)) == 5
    tokenizer("some use", padding=False)
    assert [tokenizer_sha256(again) for again in (tokenizer, Slow(b"a", {}))] == [digests[0], digests[2]]


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was not in the cache."""
    texts: list[Any] = []
    monkeypatch.setattr(streams, "tokenize", lambda *given: texts.append(given) or tokenize(*given))
    return texts


def test_a_stream_is_tokenised_again_only_for_another_text_tokenizer_or_protocol(
    tokenizer: Any, text_file: str, tmp_path: Path, tokenised: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, provenance = StreamReader(tokenizer, tmp_path).read(text_file, "all")
    assert tokens.tolist() == reference(tokenizer, Path(text_file).read_text())
    again = StreamReader(tokenizer, tmp_path).read(text_file, "all")
    assert torch.equal(again[0], tokens)
    assert again[1] == provenance
    assert len(tokenised) == 1
    (tmp_path / "other.txt").write_text("the cat sat")
    StreamReader(tokenizer, tmp_path).read(f"{tmp_path}/other.txt", "all")
    StreamReader(with_pre_tokenizer(pre_tokenizers.Whitespace()), tmp_path).read(text_file, "all")
    monkeypatch.setattr(streams, "PROTOCOL", streams.PROTOCOL + 1)
    StreamReader(tokenizer, tmp_path).read(text_file, "all")
    assert len(tokenised) == 4


def test_a_damaged_cache_entry_is_written_again_and_an_unwritable_cache_is_not_fatal(
    tokenizer: Any, text_file: str, tmp_path: Path, tokenised: list[Any]
) -> None:
    cache, expected = tmp_path / "cache", reference(tokenizer, Path(text_file).read_text())

    def read() -> list[int]:
        return StreamReader(tokenizer, cache).read(text_file, "all")[0].tolist()

    cache.write_text("in the way")
    assert read() == expected
    cache.unlink()
    assert read() == expected
    (array,), (manifest,) = cache.glob("tokens/*/tokens.npy"), cache.glob("tokens/*/tokens.json")
    for damage in (
        lambda: array.write_bytes(array.read_bytes()[:-5]),
        lambda: np.save(array, np.array(expected) + 1),
        manifest.unlink,
        lambda: manifest.write_text("[1"),
    ):
        damage()
        assert read() == expected
        assert read() == expected  # of the entry that was written again
    assert len(tokenised) == 2 + 4


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "cohere", "gemma2", "phi"])
def test_a_model_folder_without_tokenizer_offers_a_token_array(model_type: str, tmp_path: Path) -> None:
    """Also where transformers makes one of special tokens alone, as of all of these but llama."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path))
    for word in (str(tmp_path), "tokenizer.json", "token array", "--data.tokenizer", "--data.dataset"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)
