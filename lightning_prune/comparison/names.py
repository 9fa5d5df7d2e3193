"""Short names for what a path or a long file name stands for, so that a table fits a page."""

import re
from collections.abc import Sequence

LONGEST = 20  # characters of a short name
_SUFFIX = re.compile(r"\.(txt|jsonl?|json\.gz|gz|parquet|npy|safetensors)$", re.IGNORECASE)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """A short name by name, all different: no suffix, no last folder that all share, the end of what is still long.

    ``wikitext2/test.txt`` and ``ptb/test.txt`` become ``wikitext2`` and ``ptb``. Where two would become the same, all
    keep their full names.
    """
    parts = {name: [part for part in _SUFFIX.sub("", name).split("/") if part] or [name] for name in names}
    while len(parts) > 1 and _share_their_end(list(parts.values())):
        parts = {name: found[:-1] for name, found in parts.items()}
    short = {name: _end("/".join(found)) for name, found in parts.items()}
    return short if len(set(short.values())) == len(short) else {name: name for name in names}


def _share_their_end(parts: Sequence[Sequence[str]]) -> bool:
    return all(len(found) > 1 for found in parts) and len({found[-1] for found in parts}) == 1


def _end(name: str) -> str:
    """The last words of a long name that fit."""
    if len(name) <= LONGEST:
        return name
    tail = name[-LONGEST:]
    start = re.search(r"[/_. -]", tail[:-1])
    return "…" + tail[start.end() if start else 1 :]
