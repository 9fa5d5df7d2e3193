import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.export.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, Vocabulary, read_vocabulary
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.support.errors import UserError
from tests.export.checkpoints import TOKENS, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with the demo model's tokenizer: GPT-2's kind, 1024 tokens, of which 0 begins a text and 1 ends one."""
    save(tmp_path / "model")
    return tmp_path / "model"


def read(folder: Path, rows: int = TOKENS, ends: list[int] | None = None) -> Vocabulary:
    return read_vocabulary(Checkpoint.open(str(folder)), rows, ends or [])


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


def test_every_row_of_the_embedding_has_its_token(folder: Path) -> None:
    tokenizer: Any = Checkpoint.open(str(folder)).tokenizer
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    found = read(folder, rows=1030)
    assert found.tokens[:1025] == tokenizer.convert_ids_to_tokens(range(1025))
    assert found.types == [CONTROL, CONTROL, *[NORMAL] * 1022, USER_DEFINED, *[UNUSED] * 5]
    assert len(set(found.tokens)) == 1030
    assert (found.model, found.pre, found.add_bos, found.add_eos) == ("gpt2", "gpt-2", True, False)
    assert {name: found.special[name] for name in ("bos", "eos")} == {"bos": 0, "eos": 1}
    assert found.merges[0] == "Ġ t"


def test_a_second_token_that_ends_generation_is_told(folder: Path) -> None:
    assert read(folder, ends=[1, 7]).special["eot"] == 7
    assert "eot" not in read(folder, ends=[1]).special
    assert "eot" not in read(folder, ends=[TOKENS]).special  # no such token


def test_chat_template_travels(folder: Path) -> None:
    assert read(folder).chat_template is None
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert read(folder).chat_template == "{{ messages[0]['content'] }}"


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "split": (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "splits text in a way that has no name here"),
    "prefix": (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "splits text in a way"),
    "normalizer": (lambda c: c.update(normalizer={"type": "Lowercase"}), "has the normalizer Lowercase"),
    "whole words": (lambda c: c["model"].update(ignore_merges=True), "its ignore_merges is True"),
    "around": (
        lambda c: c["post_processor"].update(
            single=[{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}]
        ),
        "puts other tokens around a text",
    ),
    "another model's": (lambda c: c["model"]["vocab"].update({"zzz": 4_000_000_000}), "has a token 4000000000"),
    "another kind": (
        lambda c: c.update(model={"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1}, "unk_token": "<s>"}),
        "is a WordLevel tokenizer",
    ),
    "pieces": (lambda c: c["model"].update(byte_fallback=True), "prepares text in a way that SentencePiece"),
    "damage": (lambda c: c.pop("model"), "the tokenizer cannot be loaded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_would_be_read_otherwise_is_refused(name: str, folder: Path) -> None:
    change, says = REFUSED[name]
    edit(folder / "tokenizer.json", change)
    with pytest.raises(UserError, match=says):
        read(folder)


def test_a_model_without_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        read(folder)
