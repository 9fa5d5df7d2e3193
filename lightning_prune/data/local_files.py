"""Text in local files and folders, as far as `datasets` can load them."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import datasets

from lightning_prune.support.errors import UserError
from lightning_prune.support.quiet import quiet_datasets
from lightning_prune.support.regular_files import is_special, require_regular

FILE_KINDS = (
    ".txt, .jsonl, .json, .csv or .parquet file (also compressed, such as .json.gz), folder of such files or saved "
    "by datasets.save_to_disk, or token array (.npy, .safetensors)"
)
LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
JOINER = "\n\n"  # documents of a local file are joined by a blank line
_OPTIONS = "--data.dataset and --data.eval_datasets"


def local_splits(path: Path) -> list[str]:
    """The splits of a folder; an empty list for a file, and for a saved dataset without splits.

    Raises:
        UserError: a folder that `datasets` cannot load.
    """
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
    tables = _open(path)
    rows = tables[split] if isinstance(tables, dict) else tables
    try:
        with quiet_datasets():
            rows = rows if rows.features else rows._resolve_features()
            kinds = {name: getattr(kind, "dtype", "") for name, kind in rows.features.items()}
            column = _text_column(path, kinds)
            documents = (row[column] for row in rows.select_columns(column))
            text = JOINER.join(document for document in documents if document is not None)
    except UserError:
        raise
    except Exception as error:  # arrow, zlib, json, pandas and datasets have no common base
        raise _unreadable(path, error) from error
    return text, rows._fingerprint if isinstance(rows, datasets.Dataset) else None


def _open(path: Path) -> Any:
    """A table of rows, or a dict of them by split. Files are streamed: no copy goes into the cache of `datasets`."""
    for part in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if is_special(part):
            require_regular(part, _OPTIONS)
    kinds = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in COMPRESSED]
    kind = LOADERS.get(kinds[-1]) if kinds else None
    try:
        with quiet_datasets():
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                return datasets.load_from_disk(str(path))
            if path.is_dir():
                return datasets.load_dataset(str(path), streaming=True)
            if kind is not None:
                options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
                files = glob.escape(str(path.absolute()))
                return datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **options)
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    raise UserError(f"{path} is of an unknown kind; {_OPTIONS} take a {FILE_KINDS}")


def _text_column(path: Path, kinds: dict[str, str]) -> str:
    """`text`, else `sentence`, else the only column of strings."""
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string", "string_view")]
    for name in ("text", "sentence"):
        if name in strings:
            return name
    if len(strings) == 1:
        return strings[0]
    columns = ", ".join(f"{name} (text)" if name in strings else name for name in kinds) or "none"
    raise UserError(
        f"cannot tell which column of {path} is the text; found: {columns}. Name it text or sentence, or choose "
        f"another file with {_OPTIONS}"
    )


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or ["it holds nothing"])[0]
    if isinstance(error, AttributeError | TypeError | KeyError):  # their words are about the code of datasets
        reason = "its entries are not those that datasets writes"
    return UserError(f"cannot read {path}: {reason}. Check the file, or choose another with {_OPTIONS}")
