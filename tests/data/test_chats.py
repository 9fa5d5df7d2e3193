"""Rows of chats are documents in the words of the tokenizer's chat template."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer

import lightning_prune
from lightning_prune.data.corpora import load_corpus
from lightning_prune.data.rows import Chat, documents
from lightning_prune.support.errors import UserError
from tests.data.conftest import WORDS, write_rows

TEMPLATE = (
    "{{ '<s>' }}{% for tool in tools or [] %}{{ tool.name }}{% endfor %}"
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant', 'tool') %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
)
SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def said(*turns: tuple[str, str]) -> str:
    """What the template writes, by hand."""
    return "<s>" + "".join(f"<|{role}|>{content}<|end|>" for role, content in turns)


@pytest.fixture(scope="session")
def chatty(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("chatty")
    tokenizer.save_pretrained(folder)
    return str(folder)


def read(path: Path, folder: str, column: str | None = None, split: str = "all") -> str:
    return load_corpus(str(path), split, None, column, lambda: AutoTokenizer.from_pretrained(folder)).text


HELLO = said(("user", "hello"), ("assistant", "hi"))
ASKED = said(("system", "be kind"), ("user", "hello"), ("assistant", "hi"))
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
SENT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "messages beside a source": ({"messages": MESSAGES, "source": "web"}, HELLO),
    "messages beside their text": ({"text": "hello hi", "prompt": "hello", "messages": MESSAGES}, HELLO),
    "conversations beside an id": ({"id": "7", "conversations": SENT}, HELLO),
    "conversations with a system column": ({"system": "be kind", "conversations": SENT}, ASKED),
    "a system turn": ({"messages": [{"role": "system", "content": "be kind"}, *MESSAGES]}, ASKED),
    "a system turn from": ({"conversations": [{"from": "system", "value": "be kind"}, *SENT]}, ASKED),
    "any name": ({"dialogue": MESSAGES, "topic": "x"}, HELLO),
    "parts": ({"messages": [one | {"content": [{"type": "text", "text": one["content"]}]} for one in MESSAGES]}, HELLO),
    "prompt and completion": ({"prompt": "hello", "completion": "hi"}, HELLO),
    "prompt and completion of turns": ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, HELLO),
    "instruction": ({"instruction": "hello", "output": "hi"}, HELLO),
    "instruction with an empty input": ({"instruction": "hello", "input": "", "output": "hi"}, HELLO),
    "instruction with an input": (
        {"instruction": "add", "input": "1 2", "output": "three"},
        said(("user", "add\n\n1 2"), ("assistant", "three")),
    ),
    "a question": ({"id": "9", "system_prompt": "be kind", "question": "hello", "response": "hi"}, ASKED),
    "preferences": ({"prompt": "hello", "chosen": MESSAGES, "rejected": MESSAGES[:1]}, HELLO),
    "preferences in words": ({"prompt": "hello", "chosen": "hi", "rejected": "no"}, HELLO),
    "input and output": ({"input": "hello", "output": "hi"}, HELLO),
    "an answer in JSON": ({"query": "hello", "answer": '[{"a": 1}]'}, HELLO.replace("hi", '[{"a": 1}]')),
    "turns of a speaker": (
        {"id": "7", "dialogue": [{"speaker": "user", "text": "hello"}, {"speaker": "bot", "text": "hi"}]},
        HELLO,
    ),
    "turns as JSON": ({"id": "7", "source": "web", "messages": json.dumps(MESSAGES)}, HELLO),
    "turns as Python": ({"id": "7", "conversations": str(SENT)}, HELLO),
    "a tool's turn": (
        {"conversations": [SENT[0], {"from": "function_call", "value": "f()"}, {"from": "observation", "value": "3"}]},
        said(("user", "hello"), ("assistant", "f()"), ("tool", "3")),
    ),
    "tools": ({"messages": MESSAGES, "tools": [{"name": "f"}]}, HELLO.replace("<s>", "<s>f")),
    "tools as JSON": ({"messages": MESSAGES, "tools": '[{"name": "f"}]'}, HELLO.replace("<s>", "<s>f")),
}


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "a.parquet", "a.csv", "saved"])
@pytest.mark.parametrize("case", ROWS)
def test_a_row_is_a_document_in_the_words_of_the_template(case: str, kind: str, chatty: str, tmp_path: Path) -> None:
    row, expected = ROWS[case]
    assert read(write_rows(tmp_path / kind, [row, row]), chatty) == expected * 2


def test_rows_may_differ_and_be_empty(chatty: str, tmp_path: Path) -> None:
    rows = [{"messages": MESSAGES, "n": 1}, {"messages": None}, {"messages": []}, {"messages": MESSAGES[:1]}]
    file = write_rows(tmp_path / "corpus" / "a.jsonl", rows)
    assert read(file, chatty) == read(file.parent, chatty, split="train") == HELLO + said(("user", "hello"))


def test_a_chat_may_be_a_list_without_a_name(chatty: str, tmp_path: Path) -> None:
    for name, content in (
        ("lists.json", json.dumps([MESSAGES, MESSAGES])),
        ("lists.jsonl", "\n".join([json.dumps(MESSAGES)] * 2)),
        ("indented.json", json.dumps({"data": [{"messages": MESSAGES}] * 2}, indent=1)),
    ):
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name, chatty) == HELLO * 2
    (tmp_path / "one.json").write_text(json.dumps(MESSAGES))
    assert read(tmp_path / "one.json", chatty) == HELLO


NO_TEXT = r"cannot tell which column"
REFUSED: dict[str, tuple[dict[str, Any], str | None, str]] = {  # a row, --data.column, and what the message says
    "texts beside an id": ({"data": ["hello", "hi"], "id": "7"}, None, NO_TEXT),
    "unknown keys": ({"conversation": [{"human": "hello", "bot": "hi"}], "source": "web"}, None, NO_TEXT),
    "one turn a row": ({"role": "user", "content": "hello"}, None, NO_TEXT),
    "no content": ({"messages": [{"role": "user", "said": "hello"}]}, None, "row 1: a turn has no content"),
    "two chats": ({"a": MESSAGES, "b": MESSAGES, "text": "x"}, None, r"a \(chat\), b \(chat\).*--data\.column"),
    "no such column": (
        {"messages": MESSAGES, "source": "web", "n": 1},
        "no",
        r"--data\.column no.*not there.*messages \(chat\), source \(text\), n",
    ),
    "a column of numbers": ({"messages": MESSAGES, "n": 1}, "n", r"--data\.column n: .*neither text"),
    "an unknown role": ({"messages": [{"role": "judge", "content": "a"}]}, None, "row 1.*unknown role judge"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, None, "row 1.*not text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_or_cannot_be_rendered_is_one_message(case: str, chatty: str, tmp_path: Path) -> None:
    row, column, words = REFUSED[case]
    with pytest.raises(UserError, match=words):
        read(write_rows(tmp_path / "a.jsonl", [row, row]), chatty, column)


def test_a_tokenizer_without_a_template_reads_columns_of_text_alone(tokenizer_folder: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": MESSAGES, "source": "web"}])
    with pytest.raises(UserError, match=r"no chat template.*--data\.tokenizer.*--data\.column"):
        read(path, tokenizer_folder)
    assert read(path, tokenizer_folder, "source") == "web"


def test_columns_are_told_by_rows_that_fit_in_memory() -> None:
    read_rows = []

    def rows(_: list[str] | None) -> Iterator[dict[str, Any]]:
        for number in range(100):
            read_rows.append(number)
            yield {"text": "x" * (1 << 22), "id": number}

    assert len(next(documents("a table", rows, None, Chat(None)))) == 1 << 22
    assert read_rows == [0, 1, 2, 3, 4, 0]  # 16 million characters, then the first document


def chats(number: int) -> list[dict[str, Any]]:
    asked = [{"role": "user", "content": " ".join(WORDS[row % 7 : row % 7 + 6])} for row in range(number)]
    said = [{"role": "assistant", "content": f"{WORDS[row % 11]} {row}"} for row in range(number)]
    return [{"messages": [*pair], "source": "web"} for pair in zip(asked, said, strict=True)]


def test_tokens_are_those_of_the_tokenizers_own_call(chatty: str, set_up: Any, tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "chats.jsonl", chats(60)))
    calibration = set_up(path, tokenizer=chatty, sampling="sequential").calibration
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    stream: list[int] = []
    for row in chats(60):
        stream += tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
    assert calibration.tokens.flatten().tolist() == stream[: 11 * 16]
    ids = tokenizer.convert_tokens_to_ids(SPECIAL[1:])
    assert all((calibration.tokens == token).any() for token in ids)
    manifest = calibration.manifest
    assert (manifest.rendering, len(str(manifest.chat_template_sha256))) == ("chat template", 64)

    # The template writes the token that windows begin with; it is never there twice in a row.
    calibration = set_up(path, tokenizer=chatty, bos="always", num_samples=30, seq_len=8).calibration
    is_bos = calibration.tokens == tokenizer.bos_token_id
    assert is_bos[:, 0].all()
    assert is_bos[:, 1:].any()
    assert not (is_bos[:, :-1] & is_bos[:, 1:]).any()


def test_calibration_set_takes_datasets_rows_and_chats(chatty: str, tmp_path: Path) -> None:
    rows = chats(24)
    file = write_rows(tmp_path / "a.jsonl", rows)
    sources = [datasets.Dataset.from_list(rows), rows, [row["messages"] for row in rows], file]
    drawn = [lightning_prune.calibration_set(one, chatty, num_samples=9, seq_len=16) for one in sources]
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
    assert AutoTokenizer.from_pretrained(chatty).bos_token_id in drawn[0]
    with pytest.raises(UserError, match="are needed"):
        lightning_prune.calibration_set(sources[0], chatty, num_samples=900, seq_len=16)
    texts = ["web"] * len(rows)
    web = [lightning_prune.calibration_set(one, chatty, 2, 4, column="source") for one in sources[:2]]
    assert torch.equal(web[0], lightning_prune.calibration_set(texts, chatty, 2, 4))
    assert torch.equal(web[0], web[1])
