"""Text in local files, folders and globs: compressed or not, in any Unicode encoding, in the hub's layout or flat."""

import glob
import io
import json
import lzma
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice
from os.path import exists
from pathlib import Path
from typing import Any, TextIO
from zipfile import ZipFile

import datasets
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from lightning_prune.data.rows import Chat, NoSuchColumn, Row, check_characters, documents, is_turns
from lightning_prune.data.token_arrays import OPTIONS
from lightning_prune.support.errors import UserError, first_line
from lightning_prune.support.quiet import quiet_datasets
from lightning_prune.support.regular_files import is_special, require_regular

FILE_KINDS = (
    "text (.txt, .md, …), .jsonl, .json, .csv, .tsv, .parquet or .arrow file (also .gz, .bz2, .xz, .zst, .zip), glob "
    "or folder of such files, folder saved by datasets.save_to_disk, or token array (.npy, .safetensors)"
)
SIZE_LIMIT = 1 << 31  # characters: far more than is measured, less than it takes to fill a machine
BATCH = 32  # rows
PIECE = 1 << 16  # characters in which a binary file shows itself
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".raw", ".tokens", ".tex")  # what of a folder is read as text
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
OTHER_NAMES = {".ndjson": ".jsonl", ".jl": ".jsonl", ".feather": ".arrow"}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".xz": "xz", ".zip": "zip"}
METADATA = re.compile(
    r"([._].*|(readme|license|changelog).*|dataset_infos?\.json|dataset_dict\.json|state\.json|\w*config\.json)", re.I
)
KEYWORDS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
KEYWORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SHARD = re.compile(r"\d{5}-of-\d{5}")


def is_local(name: str) -> bool:
    """Whether there is a file or folder of this name, or a file that fits it as a glob."""
    return exists(name) or (glob.has_magic(name) and bool(glob.glob(name, recursive=True)))


def local_splits(name: str) -> list[str]:
    """The splits of a folder or glob; an empty list for a file, and for a saved dataset without splits."""
    path = Path(name)
    if path.is_file() or is_special(path):
        return []
    with _reading(path):
        if (saved := _saved(path)) is not None:
            return [str(split) for split in saved] if isinstance(saved, dict) else []
        return list(_files_by_split(name))


def read_local(name: str, split: str, column: str | None, chat: Chat, enough: int | None) -> tuple[str, str | None]:
    """The text of one split of a folder or glob, or of a file, and the fingerprint that ``datasets`` keeps with a saved
    folder. No document that begins after ``enough`` characters is read; None for all.

    Raises:
        UserError: unknown kind, broken content, no column that is clearly the text, a chat that cannot be rendered.
    """
    path, revision = Path(name), None
    with _reading(path):
        if (saved := _saved(path)) is not None:
            rows = saved[split] if isinstance(saved, dict) else saved
            revision, texts_of = rows._fingerprint, documents(path, partial(rows_of, rows), column, chat)
        else:
            files = [path] if path.is_file() or is_special(path) else _files_by_split(name)[split]
            texts_of = chain.from_iterable(_documents(file, column, chat, enough) for file in files)
        texts = list(until(texts_of, enough, path))
    text = chat.joined(texts)
    if not text.strip():
        raise UserError(f"{path} holds no text. Choose another file with {OPTIONS}.")
    check_characters(text, path)
    return text, revision


def until(documents: Iterable[str], enough: float | None, path: Any = "the text") -> Iterator[str]:
    """Documents, the last of them the one that makes it ``enough`` characters; None for all, and UserError where they
    are too large to be read whole."""
    size = 0
    for document in documents:
        yield document
        size += len(document)
        if enough is not None and size >= enough:
            return
        if size > SIZE_LIMIT:
            raise UserError(
                f"{path} holds more than {SIZE_LIMIT:,} characters, the most that is read. Give a shorter text with "
                f"{OPTIONS}."
            )


def rows_of(rows: Any, columns: list[str] | None) -> Iterator[Row]:
    """The rows of a ``datasets.Dataset``, with ``columns`` (None: all)."""
    chosen = rows if columns is None else rows.select_columns(columns)
    for batch in chosen.with_format("arrow").iter(BATCH):
        yield from batch.to_pylist()


def _documents(file: Path, column: str | None, chat: Chat, enough: int | None) -> Iterator[str]:
    require_regular(file, OPTIONS)
    kind = _kind(file)[0]
    readers = {".jsonl": _json, ".json": _json, ".parquet": _parquet, ".arrow": _arrow}
    readers |= {".csv": partial(_csv, separators=",;|"), ".tsv": partial(_csv, separators="\t")}
    if kind in readers:
        yield from documents(file, partial(readers[kind], file), column, chat)
        return
    if column is not None:
        raise NoSuchColumn(f"--data.column {column}: {file} is read as plain text, which has no columns. Leave it out.")
    limit = SIZE_LIMIT + 1 if enough is None else enough
    with _opened(file) as text:
        first = text.read(min(PIECE, limit))
        if "\0" in first or first.startswith(("%PDF", "{\\rtf")):
            raise UserError(f"{file} is of an unknown kind, not text. {OPTIONS} take a {FILE_KINDS}.")
        yield first + text.read(limit - len(first))


def _kind(file: Path) -> tuple[str, str]:
    """The file's ending (one for all its names) without that of a compression, and the compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = COMPRESSED.get(suffixes.pop(), "") if suffixes and suffixes[-1] in COMPRESSED else ""
    if packed == "zip" and not suffixes:
        suffixes = [Path(_only(ZipFile(file))).suffix.lower()]
    kind = suffixes[-1] if suffixes else ""
    return OTHER_NAMES.get(kind, kind), packed


def _only(archive: ZipFile) -> str:
    names = [name for name in archive.namelist() if not name.endswith("/")]
    if len(names) != 1:
        raise ValueError(f"the archive holds {len(names)} files instead of one; unpack it")
    return names[0]


def _saved(path: Path) -> Any:
    """The dataset that ``datasets.save_to_disk`` wrote to ``path``, or a dict by split; None for anything else."""
    if not any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
        return None
    _refuse_special(path.rglob("*"))
    return datasets.load_from_disk(str(path))


def _refuse_special(files: Iterable[Path]) -> None:
    for file in files:
        if is_special(file):
            require_regular(file, OPTIONS)


def _files_by_split(name: str) -> dict[str, list[Path]]:
    """The files of a folder or glob, ``train`` first. Their split is in their names or folders, as on the hub
    (``train-00000-of-00001.parquet``, ``c4-validation.json.gz``, ``test/1.txt``); files that name none are
    ``train``."""
    path = Path(name)
    base = path if path.is_dir() else next(one for one in path.parents if not glob.has_magic(str(one)))
    places = [path] if path.is_dir() else [Path(one) for one in glob.glob(name, recursive=True)]
    files = [file for one in places for file in (sorted(one.rglob("*")) if one.is_dir() else [one])]
    _refuse_special(files)
    files = [file for file in files if file.is_file()]
    if path.is_dir():
        shown = [file for file in files if not any(map(METADATA.fullmatch, file.relative_to(base).parts))]
        texts, tables = ([file for file in shown if _kind(file)[0] in kinds] for kinds in (PROSE, TABLES))
        files = tables if len(tables) >= len(texts) else texts
    if not files:
        raise UserError(f"cannot read {path}: it holds no files of text. {OPTIONS} take a {FILE_KINDS}.")
    splits: dict[str, list[Path]] = {}
    for file in sorted(set(files)):
        splits.setdefault(_split_of(file.relative_to(base)) or "train", []).append(file)
    folders = {file.relative_to(base).parent for file in files if SHARD.search(file.name)}
    configurations = [str(folder) for folder in sorted(folders) if _split_of(folder) is None]
    if len(configurations) > 1 and path.is_dir():
        raise UserError(
            f"{path} holds several datasets: {', '.join(configurations)}. Choose one with {OPTIONS}, e.g. "
            f"{path / configurations[0]}."
        )
    return {split: splits[split] for split in sorted(splits, key=lambda split: not split.startswith("train"))}


def _split_of(file: Path) -> str | None:
    if shard := re.match(r"(\w+)-\d{5}-of-\d{5}", file.name):
        return KEYWORDS.get(shard[1], shard[1])
    words = (word for part in reversed(file.parts) for word in re.split(r"[^a-z]+", part.lower()))
    return next((KEYWORDS[word] for word in words if word in KEYWORDS), None)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn any error of a library that reads ``path`` into one message."""
    try:
        with quiet_datasets():
            yield
    except UserError:
        raise
    except Exception as error:  # arrow, zlib, lzma, json, pandas and datasets have no common base
        reason = first_line(error) if str(error).strip() else "it holds nothing"
        if isinstance(error, AttributeError | TypeError | KeyError):  # their words are about the code of datasets
            reason = "its entries are not those that datasets writes"
        if isinstance(error, UnicodeDecodeError):
            reason += "; text in another encoding has to be written as UTF-8 (iconv -f latin1 -t utf-8)"
        raise UserError(f"cannot read {path}: {reason}. Check the file, or choose another with {OPTIONS}.") from error


@contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    """Open a file unpacked and decoded: by its byte-order mark, else by JSON's rule for Unicode, mostly as UTF-8."""
    packed = _kind(file)[1]
    with ExitStack() as stack:
        if packed == "zip":
            archive = stack.enter_context(ZipFile(file))
            raw: Any = stack.enter_context(archive.open(_only(archive)))
        elif packed == "xz":
            raw = stack.enter_context(lzma.open(file))
        else:
            raw = stack.enter_context(pa.input_stream(file, compression=packed or None))
        binary = stack.enter_context(io.BufferedReader(raw))
        encoding = json.detect_encoding(binary.peek(4)[:4])
        yield stack.enter_context(io.TextIOWrapper(binary, encoding=encoding))


def _json(file: Path, _: list[str] | None) -> Iterator[Row]:
    """Rows of JSON lines or of one JSON document. Not through ``datasets``: pyarrow ends the process at a line that
    says null, takes texts that look like dates for dates, and expects the types of the first 10 MB in all others."""
    with _opened(file) as text:
        numbered = enumerate(iter(partial(text.readline, SIZE_LIMIT), ""), start=1)
        lines = ((number, line) for number, line in numbered if line.strip())
        ahead = list(islice(lines, 2))
        one = _parsed(ahead[0][1]) if ahead else None
        if len(ahead) == 1 or (ahead and one is None):
            whole = one if len(ahead) == 1 else _parsed(ahead[0][1] + ahead[1][1] + text.read(SIZE_LIMIT))
            if (rows := _rows_in(whole)) is not None:
                yield from rows
                return
        for number, line in chain(ahead, lines):
            if (row := _row(_parsed(line))) is None:
                raise UserError(
                    f"{file}, line {number}: not a JSON object. {OPTIONS} take one a line, or a list of them."
                )
            yield row


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError: also a number of 5000 digits
        return None


def _rows_in(content: Any) -> list[Row] | None:
    """The rows of a document: a list of rows, alone or as the only thing in an object, or one row."""
    if isinstance(content, dict):
        (only, *others) = content.values() or [None]
        inside = _rows_in(only) if isinstance(only, list) and only and not others and not is_turns(only) else None
        return inside or [content]
    content = [content] if content and is_turns(content) else content
    rows = [_row(one) for one in content] if isinstance(content, list) else [None]
    return None if None in rows else rows  # type: ignore[return-value]


def _row(content: Any) -> Row | None:
    """An object as it is, a text or a chat as the only column; None for anything else."""
    if isinstance(content, str):
        return {"text": content}
    if content and is_turns(content):
        return {"messages": content}
    return content if isinstance(content, dict) else None


def _csv(file: Path, _: list[str] | None, separators: str) -> Iterator[Row]:
    with _opened(file) as text:
        header = text.readline(SIZE_LIMIT)
    options: dict[str, Any] = {"sep": max(separators, key=header.count), "index_col": False, "chunksize": 1000}
    with _opened(file) as text, warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows with more fields than the header has
        with pd.read_csv(text, **options) as chunks:
            for chunk in chunks:
                yield from chunk.astype(object).where(chunk.notna(), None).to_dict("records")


def _parquet(file: Path, columns: list[str] | None) -> Iterator[Row]:
    """Rows of a parquet file. ``datasets`` would unpack a row group at once, and a small file can hold 40 GB."""
    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(BATCH, columns=columns):
            yield from batch.to_pylist()


def _arrow(file: Path, columns: list[str] | None) -> Iterator[Row]:
    with pa.memory_map(str(file)) as source:
        try:
            table = pa.ipc.open_stream(source).read_all()  # as ``datasets`` writes it
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(source).read_all()
        for batch in table.select(columns or table.column_names).to_batches(BATCH):
            yield from batch.to_pylist()
