"""Text in local files: plain text, JSON lines, parquet, and folders written by `datasets.save_to_disk`."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from lightning_prune.support.errors import UserError
from lightning_prune.support.regular_files import is_special, require_regular

FILE_KINDS = (
    ".txt, .jsonl, .json.gz or .parquet file, folder saved by datasets.save_to_disk, "
    "or token array (.npy, .safetensors)"
)
_OPTIONS = "--data.dataset and --data.eval_datasets"
JOINER = "\n\n"  # documents of a local file are joined by a blank line
BATCH = 32  # rows of a table that are unpacked before they are counted
SIZE_LIMIT = 1 << 32  # bytes and characters: far more than calibration reads, less than it takes to fill a machine


def local_splits(path: Path) -> list[str]:
    """The splits of a saved DatasetDict; an empty list for anything without splits."""
    index = path / "dataset_dict.json"
    if not index.is_file():
        return []
    try:
        return [str(split) for split in json.loads(index.read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(path, error) from error


def read_local(path: Path, split: str) -> tuple[str, str | None]:
    """The text of one split and its revision (the fingerprint `datasets` keeps; None for a file).

    Args:
        path: an existing file or folder.
        split: of a saved DatasetDict; ignored for everything else.

    Raises:
        UserError: unknown kind, broken content, or no column that is clearly the text.
    """
    if is_special(path):
        require_regular(path, _OPTIONS)
    try:
        text, revision = _saved_folder(path, split) if path.is_dir() else (_file(path), None)
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path} holds {text[error.start]!a}, half of a character (a lone surrogate), which no tokenizer takes. "
            f"Repair the text, or choose another with {_OPTIONS}"
        ) from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    return text, revision


def _file(path: Path) -> str:
    name = path.name.lower()
    if path.stat().st_size > SIZE_LIMIT:
        raise UserError(f"{path} has {path.stat().st_size} bytes, the most that is read is {SIZE_LIMIT}; {_OPTIONS}")
    if name.endswith(".txt"):
        return path.read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
        with path.open(encoding="utf-8") as lines:
            return _json_lines(path, lines)
    if name.endswith(".json.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            return _json_lines(path, _bounded(path, stream))
    if name.endswith(".parquet"):
        return _table(path)
    raise UserError(f"{path} is of an unknown kind; {_OPTIONS} take a {FILE_KINDS}")


def _table(path: Path) -> str:
    schema = pq.read_schema(path)
    column = _text_column(path, schema.names, {field.name for field in schema if _is_string(field.type)})
    with pq.ParquetFile(path, read_dictionary=[column]) as file:  # repeated texts stay one until all are counted
        left = SIZE_LIMIT
        parts = []
        for batch in file.iter_batches(batch_size=BATCH, columns=[column]):
            part = batch.column(0)
            lengths = pc.binary_length(part.dictionary).take(part.indices)
            left -= (pc.sum(lengths).as_py() or 0) + len(JOINER) * len(part)
            if left < 0:
                raise _unpacks_to_more(path)
            parts.append(part)
    return _join(text for part in parts for text in part.to_pylist())


def _unpacks_to_more(path: Path) -> UserError:
    return UserError(f"{path} unpacks to more than {SIZE_LIMIT} characters, the most that is read; {_OPTIONS}")


def _bounded(path: Path, stream: IO[str]) -> Iterator[str]:
    """The lines of a compressed file, whose size says nothing about theirs."""
    left = SIZE_LIMIT
    while line := stream.readline(left):
        left -= len(line)
        if left <= 0:
            raise _unpacks_to_more(path)
        yield line


def _saved_folder(path: Path, split: str) -> tuple[str, str | None]:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
        raise UserError(
            f"{path} is a folder, but not one saved by datasets.save_to_disk; {_OPTIONS} take a {FILE_KINDS}"
        )
    for part in path.rglob("*"):
        if is_special(part):
            require_regular(part, _OPTIONS)
    try:
        rows: Any = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if isinstance(rows, datasets.DatasetDict):
        rows = rows[split]
    strings = {name for name, kind in rows.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")}
    return _join(rows[_text_column(path, rows.column_names, strings)]), rows._fingerprint


def _json_lines(path: Path, lines: Iterable[str]) -> str:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of 5000 digits is a plain ValueError
            reason = getattr(error, "msg", None) or str(error)
            raise UserError(
                f"{path}, line {number}: not JSON ({reason}); {_OPTIONS} take one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: {_kind(row)}; {_OPTIONS} take one JSON object a line")
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    strings = {name for name in names if all(isinstance(row.get(name), str | None) for row in rows)}
    column = _text_column(path, names, strings)
    return _join(row.get(column) for row in rows)


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _text_column(path: Path, names: list[str], strings: set[str]) -> str:
    """`text`, else `sentence`, else the only column of strings."""
    for name in ("text", "sentence"):
        if name in strings:
            return name
    if len(strings) == 1:
        return next(iter(strings))
    found = ", ".join(f"{name} (text)" if name in strings else name for name in names) or "none"
    raise UserError(
        f"cannot tell which column of {path} is the text; found: {found}. Name it text or sentence, or choose "
        f"another file with {_OPTIONS}"
    )


def _join(documents: Iterable[str | None]) -> str:
    return JOINER.join(document for document in documents if document is not None)


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, AttributeError | TypeError):  # their words are about the code of datasets
        reason = "its entries are not those that datasets writes"
    return UserError(f"cannot read {path}: {reason}. Check the file, or choose another with {_OPTIONS}")
