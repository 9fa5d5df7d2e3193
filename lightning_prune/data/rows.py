"""Rows of a table as documents: which column is the text, and chats in the words of the tokenizer's chat template."""

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from lightning_prune.data.token_arrays import OPTIONS
from lightning_prune.support.errors import UserError, first_line

Row = dict[str, Any]
Rows = Callable[[list[str] | None], Iterator[Row]]  # names of columns → rows that have at least these; None for all
HEAD, HEAD_SIZE = 1000, 1 << 24  # rows that decide what a column holds, fewer if their texts have more characters
CONVERSATIONS = ("messages", "conversations", "conversation", "chosen")  # in order of preference
QUESTIONS = ("prompt", "instruction", "question", "query")
ANSWERS = ("completion", "output", "response", "answer")
CONTEXTS, SYSTEM = ("input", "context"), ("system", "system_prompt")
PLAIN = ("text", "sentence", "content")
ABOUT = re.compile(
    r"(\w+_)?(id|uuid|source|url|lang|language|category|dataset|model|split|topic|path|label|date)", re.I
)
ROLES = dict.fromkeys(("human", "user", "prompter"), "user") | {"system": "system"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot", "bard", "bing", "function_call"), "assistant")
ROLES |= dict.fromkeys(("tool", "function", "function_response", "observation"), "tool")
SENDER, SAID = ("role", "from", "speaker"), ("content", "value", "text")  # the keys of a turn
BLANK_LINE = "\n\n"


class NoSuchColumn(UserError):
    """The column that was chosen is not there."""


@dataclass(frozen=True)
class Columns:
    """Columns by what the first rows have in them."""

    names: list[str]
    strings: set[str]
    turns: set[str]  # lists of dicts with a role or a sender, or such lists written as JSON
    nested: set[str]  # other lists and dicts

    @classmethod
    def of(cls, rows: list[Row]) -> "Columns":
        """The columns of ``rows``, which may differ in them."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
        strings = {name for name in names if values[name] and all(isinstance(value, str) for value in values[name])}
        turns = {name for name in names if any(values[name]) and all(is_turns(decoded(v)) for v in values[name] if v)}
        nested = {name for name in names if any(isinstance(value, list | dict) for value in values[name])}
        return cls(names, strings - turns, turns, nested - turns)

    def __str__(self) -> str:
        kinds = dict.fromkeys(self.strings, " (text)") | dict.fromkeys(self.turns, " (chat)")
        return ", ".join(f"{name}{kinds.get(name, '')}" for name in self.names) or "none"


class Chat:
    """Renders chats with a tokenizer that is loaded at the first one."""

    def __init__(self, load: Callable[[], Any] | None) -> None:
        self._load = load
        self.sha256: str | None = None  # of the chat template, once it was used

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; UserError for none, or one without a chat template."""
        tokenizer: Any = None if self._load is None else self._load()
        try:
            template = tokenizer.get_chat_template()
        except (AttributeError, ValueError):
            raise UserError(
                "The text is a chat, and the tokenizer has no chat template to write it with. Choose a tokenizer that "
                "has one (--data.tokenizer), or a column of plain text (--data.column)."
            ) from None
        self.sha256 = hashlib.sha256(template.encode("utf-8")).hexdigest()
        return tokenizer

    def render(self, turns: list[Row], where: str, tools: Any = None) -> str:
        """One chat as text, special tokens included; ``tools`` as templates take them. UserError where there is no
        template, or one that does not take this chat."""
        tokenizer = self.tokenizer
        try:
            return str(tokenizer.apply_chat_template(turns, tools=tools or None, tokenize=False))
        except Exception as error:  # jinja2 and the template itself raise what they like
            raise UserError(
                f"{where}: the tokenizer's chat template does not take this chat ({first_line(error)}). Change the "
                f"row, or choose another tokenizer (--data.tokenizer) or a column of plain text (--data.column)."
            ) from error

    def joined(self, texts: Sequence[str]) -> str:
        """Documents as one text, with a blank line between them; nothing between chats whose template marks their
        beginning with a special token."""
        is_marked = bool(texts and self.sha256) and texts[0].startswith(tuple(self.tokenizer.get_added_vocab()))
        return ("" if is_marked else BLANK_LINE).join(texts)


def documents(path: Any, rows: Rows, column: str | None, chat: Chat) -> Iterator[str]:
    """A document per row that has one; UserError where no column is clearly the text, or a chat cannot be rendered."""
    table = Columns.of(_head(rows))
    if not table.names:  # an empty shard
        return
    columns = _columns(path, table, column)
    more = [name for name in SYSTEM if name in table.strings][:1]
    for number, row in enumerate(rows([*columns, *more, *({"tools"} & set(table.names))]), start=1):
        where = f"{path}, row {number}"
        if len(columns) == 1 and columns[0] in table.strings:
            if isinstance(value := row.get(columns[0]), list | dict):
                raise UserError(
                    f"{where}: {columns[0]} is a list or an object here, and text before. Correct the row, or choose "
                    "another column with --data.column."
                )
            if value is not None:
                yield str(value)
            continue
        turns = []
        for name in columns:
            turns += _turns(row.get(name), "assistant" if name in (*ANSWERS, "chosen") else "user", where)
        if len(columns) > 2 and isinstance(row.get(columns[1]), str):  # instruction and its input are one turn
            asked = BLANK_LINE.join(str(row[name]) for name in columns[:2] if row.get(name))
            turns = [{"role": "user", "content": asked}, *_turns(row.get(columns[2]), "assistant", where)]
        if more and row.get(more[0]) and turns and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": row[more[0]]})
        if turns:
            tools = decoded(row.get("tools"))
            yield chat.render(turns, where, tools if isinstance(tools, list) else None)


def _head(rows: Rows) -> list[Row]:
    head, size = [], 0
    for row in islice(rows(None), HEAD):
        head.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if size > HEAD_SIZE:
            break
    return head


def _columns(path: Any, table: Columns, column: str | None) -> list[str]:
    """A column of text or turns, or the columns of question, perhaps context, and answer."""
    strings, turns = table.strings, table.turns
    if column is not None:
        if column in strings | turns:
            return [column]
        problem = "neither text nor the turns of a chat" if column in table.names else "not there"
        raise NoSuchColumn(
            f"--data.column {column}: in {path} it is {problem}; found: {table}. Choose a column of text or chats."
        )
    chats = [name for name in CONVERSATIONS if name in turns] or sorted(turns - {"tools"})
    question, answer = ([name for name in names if name in strings | turns] for names in (QUESTIONS, ANSWERS))
    context = [name for name in CONTEXTS if name in strings][:1]
    if not question:
        question, context = context, []
    if question and not answer:  # of preferences
        answer = [name for name in ("chosen",) if name in strings]
    pair = [*question, *context, *answer] if len(question) == len(answer) == 1 else []
    if any(name in turns for name in pair):
        return pair
    if chats and (len(chats) == 1 or chats[0] in CONVERSATIONS):
        return chats[:1]
    plain = [] if chats else [name for name in PLAIN if name in strings][:1]
    if plain == ["content"] and set(SENDER) & set(table.names):  # a table of turns, one a row
        plain = []
    if plain or pair:
        return plain or pair
    if len(strings) == 1 and not chats and not (table.nested and ABOUT.fullmatch(next(iter(strings)))):
        return list(strings)
    raise UserError(
        f"cannot tell which column of {path} is the text; found: {table}. Choose one with --data.column, name "
        f"it text, or choose another file with {OPTIONS}."
    )


def _turns(value: Any, role: str, where: str) -> list[Row]:
    """A string as one turn; turns with the keys and roles that templates know. Other keys of a turn are kept."""
    if not value:
        return []
    if not is_turns(value := decoded(raw := value)):
        return [{"role": role, "content": str(raw)}]
    turns = []
    for turn in value:
        more = {key: item for key, item in turn.items() if key not in (*SENDER, *SAID) and item is not None}
        sender = next((turn[key] for key in SENDER if turn.get(key)), role)
        said = next((turn[key] for key in SAID if turn.get(key) is not None), None)
        if said is None and "tool_calls" not in more and not set(SAID) & set(turn):
            raise UserError(
                f"{where}: a turn has no content; found: {', '.join(turn)}. Give it one of {', '.join(SAID)}."
            )
        turns.append(more | {"role": ROLES.get(str(sender).lower(), sender), "content": _content(said, where)})
    return turns


def _content(content: Any, where: str) -> str:
    if isinstance(content, str | None):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in parts]
    if any(text is None for text in texts):
        raise UserError(f"{where}: a part of a turn is not text (an image, a sound). Remove it: only text can be read.")
    return "".join(map(str, texts))


def decoded(value: Any) -> Any:
    """The list that a text writes as JSON, or as Python (pandas does, in a CSV file); any other value as it is."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return value


def is_turns(value: Any) -> bool:
    """Whether this is a list of turns."""
    return isinstance(value, list) and all(isinstance(turn, dict) and set(SENDER) & set(turn) for turn in value)


def check_characters(text: str, what: object) -> None:
    """UserError where ``what`` holds half of a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds {text[error.start]!a}, half of a character (a lone surrogate), which no tokenizer takes. "
            f"Repair the text, or choose another with {OPTIONS}."
        ) from None
