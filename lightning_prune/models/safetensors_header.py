"""The header of one safetensors file: which tensors lie where, checked against the size of the file."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lightning_prune.support.errors import UserError
from lightning_prune.support.regular_files import require_regular

OPTION = "--model.pretrained"
HEADER_LIMIT = 100_000_000  # bytes; the safetensors library refuses more
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: its bytes are ``start … end - 1`` of ``file``, row-major and little-endian."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file by name.

    Raises:
        UserError: not a regular file, or its header contradicts itself or the file's size.
    """
    size = require_regular(file, OPTION)
    try:
        with file.open("rb") as stream:
            header, begin = _header_bytes(stream, size)
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=no_duplicates)
        return _entries(file, entries, begin, size)
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(
            f"{OPTION}: the weights cannot be loaded: '{file}' is damaged ({first_line(error)}). "
            f"Copy or download the file again."
        ) from None


def _header_bytes(stream: BinaryIO, size: int) -> tuple[bytes, int]:
    """The JSON header and the offset of the first tensor byte; lengths are believed only as far as the file goes."""
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise ValueError(f"{size} bytes, too short for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > size - 8 or length > HEADER_LIMIT:
        raise ValueError(f"its header claims {length} bytes, the file has {size}")
    header = stream.read(length)
    if len(header) < length:
        raise ValueError("its header ends early")
    return header, 8 + length


def _entries(file: Path, header: Any, begin: int, size: int) -> dict[str, TensorEntry]:
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    entries = {name: _entry(file, name, value, begin, size) for name, value in header.items() if name != "__metadata__"}
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise ValueError(f"tensor {name!r} begins at byte {entry.start}, not {end} where the one before it ends")
        end = entry.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file has {size}")
    return entries


def _entry(file: Path, name: str, value: Any, begin: int, size: int) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"shape or data_offsets of tensor {name!r} are not lists of sizes")
    start, end = begin + offsets[0], begin + offsets[1]
    if not begin <= start <= end <= size or end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"tensor {name!r} of shape {shape} does not fit its data_offsets {offsets}")
    return TensorEntry(file, DTYPES[dtype], tuple(shape), start, end)


def _sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 16
        and all(type(value) is int and 0 <= value < 2**63 for value in values)  # bool is an int, but no size
    )


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads(object_pairs_hook=…)``, which would keep the last of two entries of one name."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands there twice")
        found[name] = value
    return found


def first_line(error: BaseException) -> str:
    """An error of another library in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
