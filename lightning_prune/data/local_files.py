"""Text in local files, folders and globs: compressed or not, in any Unicode encoding, in the hub's layout or flat."""

import bz2
import glob
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os.path import exists
from pathlib import Path
from typing import Any, TextIO
from zipfile import ZipFile

import datasets
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from lightning_prune.data.rows import BLANK_LINE, Chat, Table, documents, is_turns
from lightning_prune.support.errors import UserError, first_line
from lightning_prune.support.quiet import quiet_datasets
from lightning_prune.support.regular_files import is_special, require_regular

FILE_KINDS = (
    "text (.txt, .md, …), .jsonl, .json, .csv, .tsv, .parquet or .arrow file (also .gz, .bz2, .xz, .zst, .zip), glob "
    "or folder of such files, folder saved by datasets.save_to_disk, or token array (.npy, .safetensors)"
)
SIZE_LIMIT = 1 << 32  # bytes and characters: far more than calibration reads, less than it takes to fill a machine
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".raw", ".tokens", ".tex")  # what of a folder is read as text
METADATA = re.compile(
    r"([._].*|(readme|license|changelog).*|dataset_infos?\.json|dataset_dict\.json|state\.json|\w*config\.json)", re.I
)
KEYWORDS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
KEYWORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SHARD = re.compile(r"\d{5}-of-\d{5}")
_OPTIONS = "--data.dataset and --data.eval_datasets"


def _zstd(path: Path) -> Any:
    return pa.input_stream(path, compression="zstd")


def _zip(path: Path) -> Any:
    archive = ZipFile(path)
    if len(archive.namelist()) != 1:
        raise ValueError(f"the archive holds {len(archive.namelist())} files instead of one: unpack it")
    return archive.open(archive.namelist()[0])


COMPRESSED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED |= {".zst": _zstd, ".zip": _zip}


@dataclass(frozen=True)
class LocalText:
    """The text of one split.

    Attributes:
        revision: the fingerprint that `datasets` keeps with a saved folder, else None.
        chat_template_sha256: of the template that chats were rendered with; None where the text is no chat.
    """

    text: str
    revision: str | None
    chat_template_sha256: str | None


def is_local(name: str) -> bool:
    """Whether there is a file or folder of this name, or a file that fits it as a glob."""
    return exists(name) or (glob.has_magic(name) and bool(glob.glob(name, recursive=True)))


def local_splits(name: str) -> list[str]:
    """The splits of a folder or glob; an empty list for a file, and for a saved dataset without splits.

    Raises:
        UserError: a folder that cannot be read.
    """
    path = Path(name)
    if path.is_file() or is_special(path):
        return []
    with _reading(path):
        if (saved := _saved(path)) is not None:
            return [str(split) for split in saved] if isinstance(saved, dict) else []
        return list(_files_by_split(name))


def read_local(name: str, split: str, column: str | None = None, chat: Chat | None = None) -> LocalText:
    """The text of one split.

    Args:
        name: an existing file or folder, or a glob.
        split: of a folder or glob; ignored for a file.
        column: of tables; None takes the one that is clearly the text or a chat.
        chat: renders chats.

    Raises:
        UserError: unknown kind, broken content, no column that is clearly the text, a chat that cannot be rendered.
    """
    path, chat = Path(name), chat or Chat(None)
    with _reading(path):
        if (saved := _saved(path)) is not None:
            rows = saved[split] if isinstance(saved, dict) else saved
            text = _joined(path, documents(path, of_dataset(rows), column, chat), chat)
            return LocalText(text, rows._fingerprint, chat.sha256)
        files = [path] if path.is_file() or is_special(path) else _files_by_split(name)[split]
        parts = (part for file in files for part in _documents(file, column, chat))
        text = _joined(path, parts, chat)
    return LocalText(text, None, chat.sha256)


def of_dataset(rows: Any) -> Table:
    """A `datasets.Dataset`."""
    return Table.of_schema(rows.features.arrow_schema, rows.select_columns)


def _documents(file: Path, column: str | None, chat: Chat) -> Iterator[str | None]:
    _check_size(file, require_regular(file, _OPTIONS))
    kind, _ = _kind(file)
    if kind == ".parquet":
        table = _parquet(file)
    elif kind == ".arrow":
        table = of_dataset(datasets.Dataset.from_file(str(file)))
    elif kind in (".jsonl", ".json"):
        table = Table.of_rows(_json(file))
    elif kind in (".csv", ".tsv"):
        table = Table.of_rows(_csv(file, "\t" if kind == ".tsv" else ","))
    else:
        yield _prose(file)
        return
    yield from documents(file, table, column, chat)


def _kind(file: Path) -> tuple[str, str]:
    """The ending without that of a compression, `.jsonl` for all its names; that of the compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    kind = suffixes[-1] if suffixes else ""
    return (".jsonl" if kind in (".ndjson", ".jl") else kind), packed


def _saved(path: Path) -> Any:
    """What `save_to_disk` of `datasets` left at `path`: a dataset or a dict by split. None for anything else."""
    if not any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
        return None
    _refuse_special(path.rglob("*"))
    return datasets.load_from_disk(str(path))


def _refuse_special(files: Iterable[Path]) -> None:
    for file in files:
        if is_special(file):
            require_regular(file, _OPTIONS)


def _files_by_split(name: str) -> dict[str, list[Path]]:
    """The files of a folder or glob, `train` first. Their split is in their names or those of their folders, as on the
    hub (`train-00000-of-00001.parquet`, `c4-validation.json.gz`, `test/1.txt`); files that name none are `train`."""
    path = Path(name)
    base = path if path.is_dir() else next(one for one in path.parents if not glob.has_magic(str(one)))
    found = [path] if path.is_dir() else [Path(one) for one in glob.glob(name, recursive=True)]
    files = [file for one in found for file in (sorted(one.rglob("*")) if one.is_dir() else [one])]
    _refuse_special(files)
    files = [file for file in files if file.is_file()]
    if path.is_dir():
        hidden = [file for file in files if any(METADATA.fullmatch(part) for part in file.relative_to(base).parts)]
        kinds = {file: _kind(file)[0] for file in files if file not in hidden}
        texts = [file for file, kind in kinds.items() if kind in PROSE]
        tables = [
            file for file, kind in kinds.items() if kind in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
        ]
        files = tables if len(tables) >= len(texts) else texts
    if not files:
        raise UserError(f"cannot read {path}: it holds no files of text; {_OPTIONS} take a {FILE_KINDS}")
    splits: dict[str, list[Path]] = {}
    for file in sorted(set(files)):
        splits.setdefault(_split_of(file.relative_to(base)) or "train", []).append(file)
    folders = {file.relative_to(base).parent for file in files if SHARD.search(file.name)}
    configurations = [str(folder) for folder in sorted(folders) if _split_of(folder) is None]
    if len(configurations) > 1 and path.is_dir():
        raise UserError(
            f"{path} holds several datasets: {', '.join(configurations)}. Choose one with {_OPTIONS}, e.g. "
            f"{path / configurations[0]}"
        )
    return {split: splits[split] for split in sorted(splits, key=lambda split: not split.startswith("train"))}


def _split_of(file: Path) -> str | None:
    if shard := re.match(r"(\w+)-\d{5}-of-\d{5}", file.name):
        return KEYWORDS.get(shard[1], shard[1])
    words = (word for part in reversed(file.parts) for word in re.split(r"[^a-z]+", part.lower()))
    return next((KEYWORDS[word] for word in words if word in KEYWORDS), None)


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


@contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    """Unpacked and decoded: what the byte-order mark says, else what JSON's rule for Unicode finds, mostly UTF-8."""
    opener = COMPRESSED.get(_kind(file)[1])
    with opener(file) if opener else open(file, "rb") as packed, io.BufferedReader(packed) as binary:
        encoding = json.detect_encoding(binary.peek(4)[:4])
        with io.TextIOWrapper(binary, encoding=encoding) as text:
            yield text


def _prose(file: Path) -> str:
    with _opened(file) as text:
        content = text.read(SIZE_LIMIT + 1)
    _check_size(file, len(content))
    if "\0" in content or content.startswith(("%PDF", "{\\rtf")):
        raise UserError(f"{file} is of an unknown kind, not text; {_OPTIONS} take a {FILE_KINDS}")
    return content


def _json(file: Path) -> list[dict[str, Any]]:
    """Rows of JSON lines or of one JSON document. Not through `datasets`: pyarrow ends the process at a line that says
    null, takes texts that look like dates for dates, and expects the types of the first 10 MB in all others."""
    rows: list[dict[str, Any]] = []
    size = 0
    with _opened(file) as text:
        for number, line in enumerate(iter(partial(text.readline, SIZE_LIMIT), ""), start=1):
            size += len(line)
            _check_size(file, size)
            if not line.strip():
                continue
            try:
                if not rows and line.lstrip().startswith("["):
                    raise ValueError("a document")
                rows.append(json.loads(line))
                rows[-1].items()
            except (ValueError, RecursionError, AttributeError) as error:  # ValueError: also a number of 5000 digits
                document = None if rows else _document(line + text.read(SIZE_LIMIT))
                if document is not None:
                    return document
                raise UserError(
                    f"{file}, line {number}: not a JSON object; {_OPTIONS} take one a line, or a list of them"
                ) from error
    if len(rows) == 1 and _kind(file)[0] == ".json":
        return _rows_of(rows[0]) or rows
    return rows


def _document(text: str) -> list[dict[str, Any]] | None:
    try:
        return _rows_of(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _rows_of(content: Any) -> list[dict[str, Any]] | None:
    """The rows of a list of objects or texts, alone or as the only list in an object; None for anything else."""
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list) and value]
        content = lists[0] if len(lists) == len(content) == 1 and not is_turns(lists[0]) else [content]
    if not isinstance(content, list) or not all(isinstance(row, dict | str) for row in content):
        return None
    return [{"text": row} if isinstance(row, str) else row for row in content]


def _csv(file: Path, separator: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    size = 0
    with _opened(file) as text, pd.read_csv(text, sep=separator, chunksize=1000) as chunks:
        for chunk in chunks:
            rows += chunk.astype(object).where(chunk.notna(), None).to_dict("records")
            size += sum(len(value) for row in rows[-len(chunk) :] for value in row.values() if isinstance(value, str))
            _check_size(file, size)
    return rows


def _parquet(path: Path) -> Table:
    """Not through `datasets`, which unpacks a row group at once, and a small file can stand for 40 GB. As a dictionary,
    repeated texts stay one until all are counted."""
    schema = pq.read_schema(path)

    def rows(columns: list[str]) -> Iterator[dict[str, Any]]:
        size, parts = 0, []
        plain = len(columns) == 1 and columns[0] in table.strings
        with pq.ParquetFile(path, read_dictionary=columns if plain else None) as file:
            for batch in file.iter_batches(batch_size=32, columns=columns):
                if not plain:
                    yield from batch.to_pylist()
                    continue
                parts.append(batch.column(0))
                lengths = pc.binary_length(parts[-1].dictionary).take(parts[-1].indices)
                size += pc.sum(lengths).as_py() or 0
                _check_size(path, size)
        for part in parts:
            yield from ({columns[0]: text} for text in part.to_pylist())

    table = Table.of_schema(schema, rows)
    return table


def _joined(path: Path, parts: Iterable[str | None], chat: Chat) -> str:
    texts: list[str] = []
    size = 0
    for document in parts:
        if document is not None:
            texts.append(document)
            size += len(document) + len(BLANK_LINE)
            _check_size(path, size)
    text = chat.joined(texts)
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
