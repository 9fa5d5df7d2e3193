"""Text in local files and folders, as `datasets` loads it; JSON lines and parquet in a way that bounds memory."""

import glob
import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from lightning_prune.support.errors import UserError, first_line
from lightning_prune.support.quiet import quiet_datasets
from lightning_prune.support.regular_files import is_special, require_regular

FILE_KINDS = (
    ".txt, .jsonl, .json.gz, .json, .csv or .parquet file, folder of such files or saved by datasets.save_to_disk, "
    "or token array (.npy, .safetensors)"
)
# Ending → loader of `datasets` and its options.
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document"}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
}
JSON_LINES = (".jsonl", ".json.gz", ".jsonl.gz")
JOINER = "\n\n"  # documents of a local file are joined by a blank line
SIZE_LIMIT = 1 << 32  # bytes and characters: far more than calibration reads, less than it takes to fill a machine
_OPTIONS = "--data.dataset and --data.eval_datasets"


def local_splits(path: Path) -> list[str]:
    """The splits of a folder; an empty list for a file, and for a saved dataset without splits.

    Raises:
        UserError: a folder that `datasets` cannot load.
    """
    with _reading(path):
        tables = _open(path) if path.is_dir() else None
    return [str(split) for split in tables] if isinstance(tables, dict) else []


def read_local(path: Path, split: str) -> tuple[str, str | None]:
    """The text of one split and its revision (the fingerprint `datasets` keeps with a saved folder, else None).

    Args:
        path: an existing file or folder.
        split: of a folder that has splits; ignored for everything else.

    Raises:
        UserError: unknown kind, broken content, or no column that is clearly the text.
    """
    name = path.name.lower()
    with _reading(path):
        if name.endswith((*JSON_LINES, ".parquet")) and not path.is_dir():
            _check_size(path, require_regular(path, _OPTIONS))
            return _joined(path, _parquet(path) if name.endswith(".parquet") else _json_lines(path)), None
        tables = _open(path)
        rows = tables[split] if isinstance(tables, dict) else tables
        rows = rows if rows.features else rows._resolve_features()
        kinds = {name: getattr(kind, "dtype", "") for name, kind in rows.features.items()}
        column = _text_column(path, kinds, {name for name, kind in kinds.items() if "string" in kind})
        text = _joined(path, (row[column] for row in rows.select_columns(column)))
    return text, rows._fingerprint if isinstance(rows, datasets.Dataset) else None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a library says of `path` as one message."""
    try:
        with quiet_datasets():
            yield
    except UserError:
        raise
    except Exception as error:  # arrow, gzip, zlib, json, pandas and datasets have no common base
        reason = first_line(error) if str(error).strip() else "it holds nothing"
        if isinstance(error, AttributeError | TypeError | KeyError):  # their words are about the code of datasets
            reason = "its entries are not those that datasets writes"
        raise UserError(f"cannot read {path}: {reason}. Check the file, or choose another with {_OPTIONS}") from error


def _open(path: Path) -> Any:
    """A table of rows, or a dict of them by split. Files are streamed: no copy goes into the cache of `datasets`."""
    for part in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if is_special(part):
            require_regular(part, _OPTIONS)
    if any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
        return datasets.load_from_disk(str(path))
    if path.is_dir():
        return datasets.load_dataset(str(path), streaming=True)
    _check_size(path, path.stat().st_size)
    if path.suffix.lower() not in LOADERS:
        raise UserError(f"{path} is of an unknown kind; {_OPTIONS} take a {FILE_KINDS}")
    kind, options = LOADERS[path.suffix.lower()]
    file = glob.escape(str(path.absolute()))
    return datasets.load_dataset(kind, data_files=file, split="train", streaming=True, **options)


def _json_lines(path: Path) -> list[str | None]:
    """The text column. Not through `datasets`: pyarrow ends the process at a line that says null, takes texts that look
    like dates for dates, and expects the types of the first 10 MB in all others."""
    rows: list[dict[str, Any]] = []
    size = 0
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(iter(partial(file.readline, SIZE_LIMIT), ""), start=1):
            size += len(line)
            _check_size(path, size)
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
                rows[-1].items()
            except (ValueError, RecursionError, AttributeError) as error:  # ValueError: also a number of 5000 digits
                raise UserError(
                    f"{path}, line {number}: not a JSON object; {_OPTIONS} take one JSON object a line"
                ) from error
    names = list(dict.fromkeys(name for row in rows for name in row))
    strings = {name for name in names if all(isinstance(row.get(name), str | None) for row in rows)}
    column = _text_column(path, names, strings)
    return [row.get(column) for row in rows]


def _parquet(path: Path) -> Iterator[str | None]:
    """The text column. Not through `datasets`, which unpacks a row group at once, and a small file can stand for 40 GB.
    As a dictionary, repeated texts stay one until all are counted."""
    schema = pq.read_schema(path)
    column = _text_column(path, schema.names, {field.name for field in schema if "string" in str(field.type)})
    size, parts = 0, []
    with pq.ParquetFile(path, read_dictionary=[column]) as file:
        for batch in file.iter_batches(batch_size=32, columns=[column]):
            parts.append(batch.column(0))
            lengths = pc.binary_length(parts[-1].dictionary).take(parts[-1].indices)
            size += pc.sum(lengths).as_py() or 0
            _check_size(path, size)
    for part in parts:
        yield from part.to_pylist()


def _text_column(path: Path, names: Iterable[str], strings: set[str]) -> str:
    """`text`, else `sentence`, else the only column of strings."""
    for name in ("text", "sentence"):
        if name in strings:
            return name
    if len(strings) == 1:
        return next(iter(strings))
    columns = ", ".join(f"{name} (text)" if name in strings else name for name in names) or "none"
    raise UserError(
        f"cannot tell which column of {path} is the text; found: {columns}. Name it text or sentence, or choose "
        f"another file with {_OPTIONS}"
    )


def _joined(path: Path, documents: Iterable[str | None]) -> str:
    parts: list[str] = []
    size = 0
    for document in documents:
        if document is not None:
            parts.append(document)
            size += len(document) + len(JOINER)
            _check_size(path, size)
    text = JOINER.join(parts)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path} holds {text[error.start]!a}, half of a character (a lone surrogate), which no tokenizer takes. "
            f"Repair the text, or choose another with {_OPTIONS}"
        ) from None
    return text


def _check_size(path: Path, size: int) -> None:
    if size > SIZE_LIMIT:
        raise UserError(f"{path} holds more than {SIZE_LIMIT} characters, the most that is read; {_OPTIONS}")
