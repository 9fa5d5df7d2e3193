import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from lightning_prune.formats.vocabulary import add_vocabulary
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.support.errors import UserError
from tests.formats.checkpoints import TOKENS, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with the demo model's tokenizer: GPT-2's kind, 1024 tokens, of which 0 begins a text and 1 ends one. It
    puts the first of them in front of a text."""
    save(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    tokenizer.save(str(file))
    return tmp_path / "model"


def read(folder: Path, rows: int = TOKENS, **generation: Any) -> dict[str, Any]:
    """What the file says of the tokenizer, by its key without ``tokenizer.``."""
    GenerationConfig(**generation).save_pretrained(folder)
    writer = gguf.GGUFWriter(None, "llama")
    add_vocabulary(writer, Checkpoint.open(str(folder)), rows)
    return {name.removeprefix("tokenizer."): value.value for name, value in writer.kv_data[0].items()}


def test_every_row_of_the_embedding_has_its_token(folder: Path) -> None:
    tokenizer: Any = Checkpoint.open(str(folder)).tokenizer
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    said = read(folder, rows=1030)
    assert said["ggml.tokens"][:1025] == tokenizer.convert_ids_to_tokens(range(1025))
    assert len(set(said["ggml.tokens"])) == 1030
    kind = gguf.TokenType
    types = [kind.CONTROL] * 2 + [kind.NORMAL] * 1022 + [kind.USER_DEFINED] + [kind.UNUSED] * 5
    assert said["ggml.token_type"] == types
    assert said["ggml.merges"][0] == "Ġ t"
    expected = {"model": "gpt2", "pre": "gpt-2", "add_bos_token": True, "add_eos_token": False}
    expected |= {"bos_token_id": 0, "eos_token_id": 1}
    assert {name: said[f"ggml.{name}"] for name in expected} == expected


def test_a_second_token_that_ends_generation_and_a_chat_template_are_told(folder: Path) -> None:
    assert read(folder, eos_token_id=[1, 7])["ggml.eot_token_id"] == 7
    plain = read(folder, eos_token_id=[1, TOKENS])  # the second is not a token
    assert "ggml.eot_token_id" not in plain
    assert "chat_template" not in plain
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert read(folder)["chat_template"] == "{{ messages[0]['content'] }}"


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
    "nothing": (lambda c: None, r"holds no tokenizer\.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_would_be_read_otherwise_is_refused(name: str, folder: Path) -> None:
    change, says = REFUSED[name]
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")
    if name == "nothing":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    with pytest.raises(UserError, match=says):
        read(folder)
