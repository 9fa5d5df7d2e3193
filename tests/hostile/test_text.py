"""Datasets that lie, are damaged or never end, as calibration text, evaluation set and token array."""

import gzip
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from safetensors.torch import save_file

from tests.hostile.harness import Bench, Case, Change, Says, cases, making
from tests.tiny import tiny_tokens

WORDS = " ".join(f"w{number % 90 + 3}" for number in range(400))

CASES: dict[str, Case] = {}


def dataset(name: str, file: str, make: Change | str | bytes, says: Says = (), status: int = 2) -> None:
    """Two cases: a file as calibration set, and as evaluation set."""

    def prepare(folder: Path) -> None:
        making(make)(folder / file)

    array = file.endswith((".npy", ".safetensors"))
    small = "" if array else "--model.pretrained READER --data.num_samples 4 --data.seq_len 16 "
    CASES[name] = Case(f"{small}--data.dataset INPUTS/{file}", status, says, prepare)
    small = "" if array else "--model.pretrained READER --data.eval_seq_len 16 "
    CASES[f"{name}, evaluated"] = Case(f"{small}--data.eval_datasets [INPUTS/{file}]", status, says, prepare)


def tokenizer(name: str, make: Change | str, says: Says = "no usable tokenizer") -> None:
    """A model whose tokenizer.json is made so."""

    def prepare(folder: Path) -> None:
        (folder / "t.txt").write_text(WORDS)
        (folder / "reader/tokenizer.json").unlink()
        making(make)(folder / "reader/tokenizer.json")

    line = "--model.pretrained INPUTS/reader --data.dataset INPUTS/t.txt --data.num_samples 4 --data.seq_len 16"
    CASES[f"tokenizer is {name}"] = Case(line, 2, says, prepare, needs="reader")


def lines(*rows: Any) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


def damaged_gzip(path: Path) -> None:
    content = bytearray(gzip.compress(lines(*[{"text": WORDS}] * 50).encode()))
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def parquet(**columns: list[Any]) -> Change:
    return lambda path: pq.write_table(pa.table(columns), path)


def cut_parquet(path: Path) -> None:
    parquet(text=[WORDS])(path)
    os.truncate(path, path.stat().st_size - 30)


def unpacking(path: Path) -> None:
    """A few hundred bytes that stand for 40 GB: one long text, and references to it."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * 2_000_000]))
    pq.write_table(
        pa.table({"text": text}), path, compression="zstd", store_schema=False, dictionary_pagesize_limit=2**30
    )


def array(values: Any) -> Change:
    return lambda path: np.save(path, values)


def npy(header: str, data: bytes = b"") -> bytes:
    """A ``.npy`` file with a header of one's own."""
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def saved_folder(path: Path, **files: str) -> None:
    path.mkdir()
    for name, content in files.items():
        (path / f"{name}.json").write_text(content)


def folder_with_a_pipe(path: Path) -> None:
    saved_folder(path, state="{}", dataset_info="{}")
    os.mkfifo(path / "data-00000-of-00001.arrow")


OPTIONS = "--data.dataset and --data.eval_datasets"
dataset("good text", "t.txt", WORDS, status=0)
dataset("good lines", "t.jsonl", lines({"text": WORDS}), status=0)
dataset(
    "good zip", "t.json.gz", lambda path: path.write_bytes(gzip.compress(lines({"text": WORDS}).encode())), status=0
)
dataset("good table", "t.parquet", parquet(text=[WORDS]), status=0)
dataset("name that is not ASCII", "données-ü-文.txt", WORDS, status=0)
dataset("empty text", "t.txt", "", "holds no text")
dataset("UTF-16 text", "t.txt", WORDS.encode("utf-16"), status=0)
dataset("half a UTF-16 text", "t.txt", WORDS.encode("utf-16")[:-1], "cannot read")
dataset("encoded surrogate in text", "t.txt", WORDS.encode() + b"\xed\xa0\x80", "cannot read")
dataset("text is a pipe", "t.txt", os.mkfifo, (OPTIONS, "named pipe"))
dataset("text is a device", "t.txt", lambda path: path.symlink_to("/dev/zero"), (OPTIONS, "device"))
dataset("text is a folder", "t.txt", Path.mkdir, "cannot read")
dataset(
    "text is huge", "t.txt", lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 10**12), "unknown kind"
)
dataset("text of an unknown kind", "t.doc", WORDS, status=0)
dataset("unknown kind", "t.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "cannot read")
dataset("lone surrogate", "t.jsonl", '{"text": "' + WORDS + ' \\ud800"}', ("'\\ud800'", "surrogate"))
dataset("lines are a pipe", "t.jsonl", os.mkfifo, "named pipe")
dataset("lines are no JSON", "t.jsonl", "x\n", "line 1")
dataset("lines are deep", "t.jsonl", "[" * 100_000, "line 1")
dataset("text is a number", "t.jsonl", lines({"text": 3}), "cannot tell which column")
dataset("zip is damaged", "t.json.gz", damaged_gzip, "cannot read")
dataset("table is cut", "t.parquet", cut_parquet, "cannot read")
dataset("table unpacks to much", "t.parquet", unpacking, "the most that is read")
del CASES["table unpacks to much"]  # calibration stops reading long before
dataset("table without rows", "t.parquet", lambda p: pq.write_table(pa.table({"text": pa.array([], pa.string())}), p))
dataset("saved folder of text", "s", lambda path: saved_folder(path, state="x", dataset_info="x"), "cannot read")
dataset("saved splits are gone", "s", lambda path: saved_folder(path, dataset_dict='{"splits": ["train"]}'), "")
dataset("saved folder with a pipe", "s", folder_with_a_pipe, "named pipe")

GOOD = tiny_tokens(6, 16).numpy()
dataset("good array", "a.npy", array(GOOD), status=0)
dataset("good tensors", "a.safetensors", lambda path: save_file({"x": tiny_tokens(6, 16)}, path), status=0)
dataset("columns first", "a.npy", array(np.asfortranarray(GOOD)), status=0)
dataset("array is a pipe", "a.npy", os.mkfifo, "named pipe")
dataset("array is cut", "a.npy", lambda p: (np.save(p, GOOD), os.truncate(p, 300)), "cannot read the token array")
dataset("array of objects", "a.npy", array(np.array([[{}]], dtype=object)), "cannot read the token array")
dataset("array of complex numbers", "a.npy", array(GOOD.astype(complex)), "complex128")
dataset("array of numbers with a point", "a.npy", array(GOOD * 1.0), "float64")
dataset("array of 64 bits without sign", "a.npy", array(GOOD.astype("u8")), "token array")
dataset("array of one dimension", "a.npy", array(GOOD[0]), "int64 [16]")
dataset("array without rows", "a.npy", array(GOOD[:0]), "[0, 16]")
dataset("negative ids", "a.npy", array(GOOD - 200), "token id -")
dataset("large ids", "a.npy", array(GOOD + 2**40), "token id")
dataset("rows too long", "a.npy", array(np.ones((2, 200), np.int64)), "128 positions")
HUGE = "{'descr': '<i8', 'fortran_order': False, 'shape': (%s, %s)}"
dataset("array claims much", "a.npy", npy(HUGE % (10**9, 10**9)), "cannot read the token array")
dataset("array with a code in its header", "a.npy", npy("__import__('os').system('x')"), "cannot read the token array")
dataset("array with an open header", "a.npy", npy("{'descr': "), "cannot read the token array")
dataset("no tensor", "a.safetensors", lambda path: save_file({}, path), "0 tensors")
dataset("tensors claim much", "a.safetensors", b"\xff" * 7 + b"\x7f{}", "cannot read the token array")


tokenizer("text", "x")
tokenizer("deep", "[" * 100_000)
tokenizer("a pipe", os.mkfifo, "tokenizer")


@cases(CASES)
def test_text(case: Case, bench: Bench) -> None:
    bench.check(case)
