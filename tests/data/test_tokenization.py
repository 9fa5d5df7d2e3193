import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_prune.data import tokenization
from lightning_prune.data.tokenization import cached_stream, load_tokenizer, tokenize, tokenizer_sha256
from lightning_prune.support.errors import UserError
from tests.data.conftest import make_text


@pytest.fixture
def tokenizer(tokenizer_folder: str) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "PIECE", 700)
    monkeypatch.setattr(tokenization, "CONTEXT", 64)


def with_pre_tokenizer(pre_tokenizer: Any) -> Any:
    raw = Tokenizer(models.BPE(unk_token="?"))
    raw.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["?"], show_progress=False)
    raw.train_from_iterator([make_text(500)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def reference(tokenizer: Any, text: str) -> list[int]:
    """One call of the underlying library for the whole text."""
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("gap", ["\n", "\n\n", " \n\n \n", "   ", "\n\n\n\t"])
def test_pieces_join_to_the_tokenisation_of_the_whole_text(tokenizer: Any, gap: str) -> None:
    text = make_text(2000).replace("\n", gap)
    assert len(list(tokenization._pieces(tokenizer, text))) > 5
    assert tokenize(tokenizer, text).tolist() == reference(tokenizer, text)


@pytest.mark.usefixtures("small_pieces")
def test_a_tokenizer_that_marks_the_start_of_a_text_gets_it_in_one_piece() -> None:
    """Like Llama 2's, it puts a word mark before whatever text it is given: every cut would add one."""
    marking = with_pre_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="always", split=False))
    text = "x" + make_text(600)
    assert list(tokenization._pieces(marking, text)) == [text]
    assert tokenize(marking, text).tolist() == reference(marking, text)


@pytest.mark.usefixtures("small_pieces")
def test_text_without_white_space_is_one_piece(tokenizer: Any) -> None:
    assert tokenize(tokenizer, "ab" * 2000).tolist() == reference(tokenizer, "ab" * 2000)


def test_no_special_token_is_added(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    plain = tokenize(tokenizer, "the cat sat").tolist()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="a $A b", special_tokens=[("a", 1), ("b", 2)]
    )
    assert len(tokenizer("the cat sat")["input_ids"]) == len(plain) + 2
    assert tokenize(tokenizer, "the cat sat").tolist() == plain


def test_empty_text_is_an_empty_stream(tokenizer: Any) -> None:
    assert tokenize(tokenizer, "").shape == (0,)
    assert tokenize(tokenizer, "").dtype == torch.int64


def test_tokenizer_sha256_is_that_of_its_serialisation_and_tells_tokenizers_apart(tokenizer: Any) -> None:
    expected = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    assert tokenizer_sha256(tokenizer) == expected
    assert tokenizer_sha256(with_pre_tokenizer(pre_tokenizers.Whitespace())) != expected
    tokenizer("some use", padding=False)
    assert tokenizer_sha256(tokenizer) == expected


def test_a_slow_tokenizer_is_hashed_over_its_vocabulary_and_added_tokens() -> None:
    class Slow:
        is_fast = False

        def __init__(self, vocabulary: bytes, added: dict[str, int]) -> None:
            self.vocabulary, self.added = vocabulary, added

        def get_added_vocab(self) -> dict[str, int]:
            return self.added

        def save_vocabulary(self, folder: str) -> tuple[str]:
            (Path(folder) / "vocab.txt").write_bytes(self.vocabulary)
            return (str(Path(folder) / "vocab.txt"),)

    variants = [Slow(b"a", {}), Slow(b"b", {}), Slow(b"a", {"<x>": 3})]
    assert len({tokenizer_sha256(variant) for variant in variants}) == 3
    assert tokenizer_sha256(variants[0]) == tokenizer_sha256(Slow(b"a", {}))


def entry_file(folder: Path, name: str) -> Path:
    (found,) = folder.glob(f"tokens/*/{name}")
    return found


def explode(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("tokenised again")


def test_a_cached_stream_is_not_tokenised_again(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached_stream(tokenizer, "the cat sat", "t", "k", tmp_path)
    assert first.tolist() == reference(tokenizer, "the cat sat")
    monkeypatch.setattr(tokenization, "tokenize", explode)
    assert torch.equal(cached_stream(tokenizer, "the cat sat", "t", "k", tmp_path), first)
    for text_digest, tokenizer_digest in (("other", "k"), ("t", "other")):
        with pytest.raises(AssertionError, match="tokenised again"):
            cached_stream(tokenizer, "the cat sat", text_digest, tokenizer_digest, tmp_path)
    monkeypatch.setattr(tokenization, "PROTOCOL", tokenization.PROTOCOL + 1)
    with pytest.raises(AssertionError, match="tokenised again"):
        cached_stream(tokenizer, "the cat sat", "t", "k", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "other ids", "no manifest", "bad manifest"])
def test_a_damaged_cache_entry_is_ignored_and_written_again(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    first = cached_stream(tokenizer, "the cat sat", "t", "k", tmp_path)
    array, manifest = entry_file(tmp_path, "tokens.npy"), entry_file(tmp_path, "tokens.json")
    if damage == "truncated":
        array.write_bytes(array.read_bytes()[:-5])
    elif damage == "other ids":
        np.save(array, first.numpy() + 1)
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("[1")
    assert torch.equal(cached_stream(tokenizer, "the cat sat", "t", "k", tmp_path), first)
    monkeypatch.setattr(tokenization, "tokenize", explode)
    assert torch.equal(cached_stream(tokenizer, "the cat sat", "t", "k", tmp_path), first)


def test_an_unwritable_cache_is_not_fatal(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    stream = cached_stream(tokenizer, "the cat sat", "t", "k", tmp_path / "file")
    assert stream.tolist() == reference(tokenizer, "the cat sat")


def test_a_model_folder_without_tokenizer_offers_a_token_array(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path))
    for word in (str(tmp_path), "tokenizer.json", "token array", "--data.tokenizer", "--data.dataset"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)
