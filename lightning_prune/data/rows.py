"""Rows of a table as documents: which column is the text, and chats in the words of the tokenizer's chat template."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from lightning_prune.support.errors import UserError, first_line

CONVERSATIONS = ("messages", "conversations", "conversation", "chosen")  # in order of preference
QUESTIONS = ("prompt", "instruction", "question", "query")
ANSWERS = ("completion", "output", "response", "answer")
CONTEXTS, SYSTEM = ("input", "context"), ("system", "system_prompt")
ROLES = dict.fromkeys(("human", "user"), "user") | {"system": "system"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot", "bard", "bing"), "assistant")
ROLES |= dict.fromkeys(("tool", "function", "function_response", "observation"), "tool")
BLANK_LINE = "\n\n"
_OPTIONS = "--data.dataset and --data.eval_datasets"


class NoSuchColumn(UserError):
    """The column that was chosen is not there."""


@dataclass(frozen=True)
class Table:
    """Columns by what they hold, and a function from names of columns to rows that have at least these."""

    names: list[str]
    strings: set[str]
    turns: set[str]  # lists of dicts with a role or a sender
    rows: Callable[[list[str]], Iterable[dict[str, Any]]]

    @classmethod
    def of_schema(cls, schema: Any, rows: Callable[[list[str]], Iterable[dict[str, Any]]]) -> "Table":
        """From an arrow schema."""
        strings = {field.name for field in schema if "string" in str(field.type) and not pa.types.is_nested(field.type)}
        return cls(schema.names, strings, {field.name for field in schema if _lists_turns(field.type)}, rows)

    @classmethod
    def of_rows(cls, rows: list[dict[str, Any]]) -> "Table":
        """From rows in memory, which may differ in their columns."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        strings = {name for name in names if all(isinstance(row.get(name), str | None) for row in rows)}
        turns = {name for name in set(names) - strings if all(is_turns(row.get(name)) for row in rows)}
        return cls(names, strings, turns, lambda _: rows)


class Chat:
    """Renders chats with a tokenizer that is loaded at the first one.

    Attributes:
        sha256: of the chat template, once it was used.
    """

    def __init__(self, load: Callable[[], Any] | None) -> None:
        self._load = load
        self.sha256: str | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            UserError: none, or one without a chat template.
        """
        tokenizer: Any = None if self._load is None else self._load()
        try:
            template = tokenizer.get_chat_template()
        except (AttributeError, ValueError):
            raise UserError(
                "the text is a chat, and the tokenizer has no chat template to write it with: choose a tokenizer that "
                "has one (--data.tokenizer), or a column of plain text (--data.column)"
            ) from None
        self.sha256 = hashlib.sha256(template.encode("utf-8")).hexdigest()
        return tokenizer

    def render(self, turns: list[dict[str, Any]], where: str) -> str:
        """One chat as text, special tokens included.

        Raises:
            UserError: no template, or one that does not take this chat.
        """
        tokenizer = self.tokenizer
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception as error:  # jinja2 and the template itself raise what they like
            raise UserError(
                f"{where}: the tokenizer's chat template does not take this chat ({first_line(error)}). Change the "
                f"row, or choose another tokenizer (--data.tokenizer) or a column of plain text (--data.column)"
            ) from error

    def joined(self, texts: Sequence[str]) -> str:
        """Documents as one text, with a blank line between them; nothing between chats whose template marks their
        beginning with a special token."""
        is_marked = bool(texts and self.sha256) and texts[0].startswith(tuple(self.tokenizer.get_added_vocab()))
        return ("" if is_marked else BLANK_LINE).join(texts)


def documents(path: Any, table: Table, column: str | None, chat: Chat) -> Iterator[str | None]:
    """One document per row, None where there is none.

    Raises:
        UserError: no column that is clearly the text, or a chat that cannot be rendered.
    """
    columns = _columns(path, table, column)
    if len(columns) == 1 and columns[0] in table.strings:
        yield from (row.get(columns[0]) for row in table.rows(columns))
        return
    system = [name for name in SYSTEM if name in table.strings][:1]
    for number, row in enumerate(table.rows([*columns, *system]), start=1):
        where = f"{path}, row {number}"
        turns = [turn for name in columns for turn in _turns(row.get(name), _role(name), where)]
        if len(columns) > 2 and isinstance(row.get(columns[1]), str):  # instruction and its input are one turn
            asked = [str(row[name]) for name in columns[:2] if row.get(name)]
            turns = [
                {"role": "user", "content": BLANK_LINE.join(asked)},
                *_turns(row.get(columns[2]), "assistant", where),
            ]
        if system and row.get(system[0]) and turns and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": row[system[0]]})
        yield chat.render(turns, where) if turns else None


def _columns(path: Any, table: Table, column: str | None) -> list[str]:
    """A column of text or turns, or the columns of question, perhaps context, and answer."""
    readable = table.strings | table.turns
    if column is not None:
        if column in readable:
            return [column]
        problem = "neither text nor the turns of a chat" if column in table.names else "not there"
        raise NoSuchColumn(f"--data.column {column}: in {path} it is {problem}; found: {_listed(table)}")
    chats = [name for name in CONVERSATIONS if name in table.turns] or sorted(table.turns)
    question, answer = ([name for name in names if name in readable] for names in (QUESTIONS, ANSWERS))
    context = [name for name in CONTEXTS if name in table.strings]
    pair = [*question, *context[:1], *answer] if len(question) == len(answer) == 1 else []
    if any(name in table.turns for name in pair):
        return pair
    if chats and (len(chats) == 1 or chats[0] in CONVERSATIONS):
        return chats[:1]
    plain: list[str] = [] if chats else [name for name in ("text", "sentence") if name in table.strings]
    if plain or pair:
        return [*plain[:1]] or pair
    if len(table.strings) == 1 and not chats:
        return list(table.strings)
    raise UserError(
        f"cannot tell which column of {path} is the text; found: {_listed(table)}. Choose one with --data.column, name "
        f"it text, or choose another file with {_OPTIONS}"
    )


def _listed(table: Table) -> str:
    kinds = dict.fromkeys(table.strings, " (text)") | dict.fromkeys(table.turns, " (chat)")
    return ", ".join(f"{name}{kinds.get(name, '')}" for name in table.names) or "none"


def _role(column: str) -> str:
    return "assistant" if column in ANSWERS else "user"


def _turns(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    """A string as one turn; turns with the keys and roles that templates know. Whatever else a turn has stays."""
    if not value:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = []
    for turn in value:
        more = {key: item for key, item in turn.items() if key not in ("from", "value") and item is not None}
        sender = turn.get("role") or turn.get("from") or role
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        turns.append(more | {"role": ROLES.get(str(sender).lower(), sender), "content": _content(content, where)})
    return turns


def _content(content: Any, where: str) -> str:
    if isinstance(content, str | None):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in parts]
    if any(text is None for text in texts):
        raise UserError(f"{where}: a part of a turn is not text (an image, a sound); only text can be read")
    return "".join(map(str, texts))


def is_turns(value: Any) -> bool:
    """Whether this is a list of turns, or None."""
    return value is None or (isinstance(value, list) and all(isinstance(turn, dict) and _sent(turn) for turn in value))


def _sent(keys: Iterable[str]) -> bool:
    return not {"role", "from"}.isdisjoint(keys)


def _lists_turns(kind: Any) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    value = kind.value_type
    return pa.types.is_struct(value) and _sent(value.field(number).name for number in range(value.num_fields))
