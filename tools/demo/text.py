"""Seeded English-like stories: what `lightning_prune/demo/text` holds.

Every story depends on its split and its number alone, so a longer text begins with the shorter one, and the
splits are held out from each other. Only `random.Random(int).random()` is used, whose sequence Python promises to keep.
"""

from __future__ import annotations

import re
from bisect import bisect
from functools import cache
from itertools import accumulate
from random import Random
from typing import Literal, NamedTuple, TypeVar

from tools.demo.grammar import ROLES, RULES, STORIES
from tools.demo.lexicon import NUMBERS, TABLES, WORDS

Split = Literal["train", "validation", "test"]
T = TypeVar("T")

NUM_STORIES: dict[Split, int] = {"train": 4000, "validation": 200, "test": 200}
_FIRST_SEED: dict[Split, int] = {"train": 0, "validation": 10**9, "test": 2 * 10**9}
_SLOT = re.compile(r"\{(\w+)(?:\.(\w+)|~(\w+)|(!))?\}")
_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou])")
_STOP_IN_QUOTE = re.compile(r'\."(?= [a-z])')


def stories(split: Split, num_stories: int | None = None) -> str:
    """Stories of one split, one paragraph each, separated by blank lines.

    Args:
        split: `train`, `validation` or `test`; no story is shared between two of them.
        num_stories: how many; by default 4000 for train, 200 for the others (a story has about 120 words).
    """
    count = NUM_STORIES[split] if num_stories is None else num_stories
    return "\n\n".join(_Story(_FIRST_SEED[split] + number).tell() for number in range(count)) + "\n"


@cache
def _zipf(size: int) -> list[float]:
    """Cumulated weights 1/rank, normalised."""
    weights = list(accumulate(1 / rank for rank in range(1, size + 1)))
    return [weight / weights[-1] for weight in weights]


class _Slot(NamedTuple):
    """`{name}`, `{name.column}`, `{name~owner}` or `{name!}`."""

    name: str
    column: str
    owner: str
    fresh: bool


@cache
def _parse(template: str) -> list[str | _Slot]:
    parts: list[str | _Slot] = []
    end = 0
    for match in _SLOT.finditer(template):
        name, column, owner, fresh = match.groups(default="")
        parts += [template[end : match.start()], _Slot(name, column, owner, fresh == "!")]
        end = match.end()
    return [*parts, template[end:]]


def _spell(sentence: str) -> str:
    """`a` before a vowel, the comma before `said Anna`, and the capital letter."""
    sentence = _STOP_IN_QUOTE.sub(',"', _BEFORE_VOWEL.sub(r"\1n ", sentence))
    first = 1 if sentence.startswith('"') else 0
    return sentence[:first] + sentence[first].upper() + sentence[first + 1 :]


class _Story:
    """One story: who plays which role, which words were said of them, and who was last spoken of."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed).random
        self.cast: dict[str, int] = {}
        self.memory: dict[str, str] = {}
        self.topic = ""

    def tell(self) -> str:
        sentences: list[str] = []
        for rule, fewest, most in self.any_of(STORIES):
            said: set[int] = set()
            for _ in range(fewest + int(self.random() * (most - fewest + 1))):
                choice = int(self.random() * len(RULES[rule]))
                while choice in said:  # a story does not repeat a sentence within a passage
                    choice = (choice + 1) % len(RULES[rule])
                said.add(choice)
                sentences.append(_spell(self.expand(RULES[rule][choice])))
        return " ".join(sentences)

    def expand(self, template: str) -> str:
        return "".join(part if isinstance(part, str) else self.slot(*part) for part in _parse(template))

    def slot(self, name: str, column: str, owner: str, fresh: bool) -> str:
        """The text of one slot, in the notation of `grammar.py`."""
        if name in ROLES:
            return self.mention(name, column)
        if name in RULES:
            return self.expand(self.any_of(RULES[name]))
        if name in ("n", "m", "sum", "rest"):
            return self.number(name, fresh)
        if fresh:
            return self.by_rank(WORDS[name])
        key = f"{name}~{owner}"
        if key not in self.memory:
            # The favourites of a row: the same list for everyone, but begun at a place of its own.
            begin = 7 * self.row(owner) + 3 * len(name)
            words = WORDS[name]
            self.memory[key] = words[(self.rank(len(words)) + begin) % len(words)]
        return self.memory[key]

    def mention(self, role: str, column: str) -> str:
        entry = TABLES[ROLES[role]][self.row(role)]
        if column:
            if column == "name" and "he" in entry:
                self.topic = role
            return entry[column]
        known, self.topic = self.topic == role, role
        return entry["he"] if known and self.random() < 0.7 else entry["name"]

    def row(self, role: str) -> int:
        """The row of the role's table that plays it in this story."""
        if role not in self.cast:
            table = ROLES[role]
            taken = {row for other, row in self.cast.items() if ROLES[other] == table}
            row = self.rank(len(TABLES[table]))
            while row in taken:
                row = (row + 1) % len(TABLES[table])
            self.cast[role] = row
        return self.cast[role]

    def number(self, name: str, fresh: bool) -> str:
        if fresh:
            return NUMBERS[2 + self.rank(11)]
        if name == "n":
            self.memory["n"] = str(3 + int(self.random() * 10))
        if name == "m":
            self.memory["m"] = str(1 + int(self.random() * (int(self.memory["n"]) - 2)))
        n, m = int(self.memory["n"]), int(self.memory.get("m", "0"))
        return NUMBERS[{"n": n, "m": m, "sum": n + m, "rest": n - m}[name]]

    def rank(self, size: int) -> int:
        return bisect(_zipf(size), self.random())

    def by_rank(self, items: list[T]) -> T:
        return items[self.rank(len(items))]

    def any_of(self, items: list[T]) -> T:
        return items[int(self.random() * len(items))]
