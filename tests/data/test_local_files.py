"""Files as people have them: the hub's folders, globs, compression, encodings, tables of every kind."""

import bz2
import gzip
import io
import json
import lzma
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from pyarrow import feather

from lightning_prune.data import corpora
from lightning_prune.data.corpora import calibration_split, held_out_split, load_corpus, split_spec
from lightning_prune.support.errors import UserError
from tests.data.conftest import make_text, write_rows


def text_of(path: Path | str, split: str | None = None) -> str:
    return load_corpus(str(path), split or calibration_split(str(path))).text


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in texts).encode()


def packed(content: bytes, kind: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, kind) as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def zipped(content: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("inside", content)
    return sink.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": partial(packed, kind="zstd"),
    ".lz4": partial(packed, kind="lz4"),
    ".zip": zipped,
}
CONTENTS = {
    "a.txt": "Grüße,\none".encode(),
    "a.jsonl": lines("Grüße,\none"),
    "c4-train.00000-of-01024.json": lines("Grüße,\none"),
    "a.ndjson": lines("Grüße,\none"),
    "a.csv": 'text,id\n"Grüße,\none",1\n'.encode(),
    "semicolons.csv": 'text;id\n"Grüße,\none";1\n'.encode(),
    "bars.csv": 'id|text\n1|"Grüße,\none"\n'.encode(),
    "a.tsv": 'text\tid\n"Grüße,\none"\t1\n'.encode(),
}


@pytest.mark.parametrize("ending", PACKED)
def test_every_kind_is_read_in_every_compression_and_what_is_cut_off_is_one_message(
    ending: str, tmp_path: Path
) -> None:
    for name, content in CONTENTS.items():
        path = tmp_path / (name + ending)
        path.write_bytes(PACKED[ending](content))
        assert text_of(path) == "Grüße,\none", name
    path.write_bytes(PACKED[ending](make_text(5000).encode())[:-40])
    if ending:
        with pytest.raises(UserError, match=r"cannot read.*a\.tsv[^\n]*$"):
            text_of(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_the_mark_of_an_encoding_is_read_and_no_text(encoding: str, tmp_path: Path) -> None:
    row = '{"text": "one Grüße"}\n'
    for name, text in {"a.txt": "one Grüße", "a.csv": "text\none Grüße\n", "a.jsonl": row, "a.json": row}.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert text_of(tmp_path / name) == "one Grüße", name


@pytest.mark.parametrize("name", ["we[i]rd*.TXT", ".hidden.txt", "a.md", "wiki.train.tokens", "README", "b.py"])
def test_text_under_any_name_is_text_without_splits_and_binaries_are_not(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("# one\r\n\ntwo\n")
    assert text_of(tmp_path / name) == "# one\n\ntwo\n"
    assert (calibration_split(str(tmp_path / name)), held_out_split(str(tmp_path / name))) == ("all", None)
    with pytest.raises(UserError, match=r"no split 'test'.*Leave the split out"):
        text_of(tmp_path / name, "test")
    if not name.lower().endswith(".txt"):
        (tmp_path / name).write_bytes(b"one\0two")
        with pytest.raises(UserError, match=r"unknown kind.*\.parquet"):
            text_of(tmp_path / name)


JSON_DOCUMENTS = {
    "lines": '{"text": "a"}\n{"text": "b"}\n',
    "a list": '[{"text": "a"}, {"text": "b"}]',
    "a list, indented": json.dumps([{"text": "a"}, {"text": "b"}], indent=2),
    "texts": '["a", "b"]',
    "a field": '{"data": [{"text": "a"}, {"text": "b"}]}',
    "a field, indented": json.dumps({"data": [{"text": "a"}, {"text": "b"}]}, indent=2),
    "dates and numbers": '{"text": "a", "n": 1}\n{"text": "b", "n": "2020-01-01"}\n',
    "rows that differ": '{"text": "a"}\n\n{"text": null}\n{"y": [1, {"z": 2}], "text": "b"}\n{"y": []}',
}


@pytest.mark.parametrize("case", JSON_DOCUMENTS)
def test_json_is_lines_or_a_document(case: str, tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(JSON_DOCUMENTS[case].encode()))
    (tmp_path / "a.json").write_text(JSON_DOCUMENTS[case])
    assert text_of(tmp_path / "a.json") == text_of(tmp_path / "a.json.gz") == "a\n\nb"


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "a.json.gz", "a.csv", "a.parquet", "a_folder"])
def test_every_table_finds_its_text_column(tmp_path: Path, kind: str) -> None:
    documents = ["Grüße, one.", "two\nlines", "three"]
    for name in ("text", "sentence", "whatever"):
        rows = [{"id": number, name: text} for number, text in enumerate(documents)]
        urls = [row | {"url": "u"} if name == "text" else row for row in rows]
        assert text_of(write_rows(tmp_path / name / kind, urls)) == "Grüße, one.\n\ntwo\nlines\n\nthree"
    missing = [{"text": "one"}, {"text": None}, {"text": "two"}]
    assert text_of(write_rows(tmp_path / "missing" / kind, missing)) == "one\n\ntwo"
    path = write_rows(tmp_path / kind, [{"title": text, "body": text, "id": 1} for text in documents])
    with pytest.raises(UserError, match=r"title.*body.*id.*--data\.dataset"):
        text_of(path)


def test_saved_splits_are_separate_corpora_with_a_revision(tmp_path: Path) -> None:
    rows = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "validation")}
    folder = str(tmp_path / "d")
    datasets.DatasetDict(rows).save_to_disk(folder)
    assert (calibration_split(folder), held_out_split(folder)) == ("train", "validation")
    train, held_out = load_corpus(folder, "train"), load_corpus(folder, "validation")
    assert (train.text, held_out.text) == ("train", "validation")
    assert train.revision
    assert train.revision != held_out.revision
    with pytest.raises(UserError, match=r"no split 'test'.*train, validation"):
        load_corpus(folder, "test")
    datasets.DatasetDict({"test": rows["train"], "dev": rows["train"]}).save_to_disk(tmp_path / "dev")
    with pytest.raises(UserError, match=r"no train.*:dev"):
        text_of(tmp_path / "dev")


BROKEN = {  # more of them are in tests/hostile
    "a.jsonl": (b'{"text": "x"}\n{oops\n', "line 2"),
    "null.jsonl": (b"null\n", "line 1"),
    "a.json.gz": (b"not gzip", "cannot read.*a.json.gz"),
    "a.txt": ("Grüße".encode("latin-1"), "cannot read.*utf-8.*iconv -f latin1 -t utf-8"),
    "a.pdf": (b"%PDF", r"unknown kind.*\.txt"),
    "folder/config.json": (b"{}", "holds no files of text.*parquet"),
    "without text.txt": (b" \n", "holds no text"),
    "without text.json": (b"[]", "holds no text"),
    "without text.csv": (b"text,id\n", "holds no text"),
    "without text.jsonl": (b'{"text": ""}', "holds no text"),
    "a comma.csv": (b"text\nhello, you\n", "cannot read.*a comma.csv"),
    "a comma more.csv": (b"text,id\na,1\nhello, you,2\n", "cannot read.*a comma more.csv"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_and_folders_are_one_message(tmp_path: Path, name: str, capfd: Any) -> None:
    content, words = BROKEN[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        text_of(path.parent if "/" in name else path)
    assert re.search(words, str(error.value))
    assert "--data.dataset" in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_folder_of_the_hub_has_its_configurations_and_splits(tmp_path: Path) -> None:
    raw = tmp_path / "wikitext" / "wikitext-2-raw-v1"
    for split in ("test", "train", "validation"):
        write_rows(raw / f"{split}-00000-of-00001.parquet", [{"text": split}])
    for name in ("README.md", ".gitattributes", ".cache/huggingface/x.json"):  # are no text of it
        (tmp_path / "wikitext" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "wikitext" / name).write_text("{}")
    for folder in (raw, tmp_path / "wikitext"):
        assert (calibration_split(str(folder)), held_out_split(str(folder))) == ("train", "test")
        assert [text_of(folder, split) for split in ("train", "validation", "test")] == ["train", "validation", "test"]
    assert split_spec(f"{raw}:validation") == (str(raw), "validation")
    assert text_of(raw / "test-00000-of-00001.parquet") == "test"

    write_rows(tmp_path / "wikitext" / "wikitext-103-v1" / "train-00000-of-00001.parquet", [{"text": "large"}])
    with pytest.raises(UserError, match=r"several datasets: wikitext-103-v1, wikitext-2-raw-v1\. Choose"):
        text_of(tmp_path / "wikitext")
    assert text_of(raw) == "train"


LAYOUTS: dict[str, dict[str, str]] = {
    "shards in order": {"train": "ab", "data/train-00001-of-00002.jsonl": "b", "data/train-00000-of-00002.jsonl": "a"},
    "c4": {"train": "ab", "en/c4-train.00000-of-01024.json.gz": "a", "en/c4-train.00001-of-01024.json": "b"},
    "validation": {"train": "a", "validation": "v", "c4-train.00000-of-01024.json": "a", "c4-validation.json": "v"},
    "others": {"train_sft": "a", "gen": "t", "train_sft-00000-of-00001.jsonl": "a", "gen-00000-of-00001.jsonl": "t"},
    "folders of splits": {"train": "ab", "test": "t", "train/1.jsonl": "a", "train/2.jsonl": "b", "test/1.jsonl": "t"},
    "dev": {"train": "a", "validation": "v", "train.jsonl": "a", "dev.jsonl": "v"},
    "none": {"train": "ab", "1.jsonl": "a", "2.jsonl": "b"},
    "kinds": {"train": "a", "test": "t", "train.jsonl": "a", "test.csv": "t"},
    "prose": {"train": "ab", "chapter1.txt": "a", "more/chapter2.md": "b", "README.md": "no"},
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_split_of_a_file_is_in_its_name(case: str, tmp_path: Path) -> None:
    expected = {name: text for name, text in LAYOUTS[case].items() if "." not in name and text}
    base = tmp_path / "train and test"  # what the folder itself is called says nothing
    for name, text in LAYOUTS[case].items():
        if "." in name:
            path, content = base / name, f"text\n{text}\n".encode() if name.endswith(".csv") else lines(text)
            path.parent.mkdir(parents=True, exist_ok=True)
            prose = name.endswith((".txt", ".md"))
            path.write_bytes(text.encode() if prose else gzip.compress(content) if name.endswith(".gz") else content)
    assert {split: text_of(base, split).replace("\n", "") for split in expected} == expected
    with pytest.raises(UserError, match=", ".join(expected)):
        text_of(base, "no")


def test_globs_are_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(name))
    (tmp_path / "x.txt").write_text("x")
    assert text_of(tmp_path / "*.jsonl") == "a\n\nb\n\nc"
    assert text_of(tmp_path / "[ab].jsonl") == "a\n\nb"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.jsonl").write_bytes(lines("d"))
    assert text_of(tmp_path / "**" / "*.jsonl") == "a\n\nb\n\nc\n\nd"
    (tmp_path / "[ab].jsonl").write_bytes(lines("a file of this very name"))
    assert text_of(tmp_path / "[ab].jsonl") == "a file of this very name"
    with pytest.raises(UserError, match=r"neither a named dataset nor a file"):
        text_of(tmp_path / "*.nothing")


def test_a_zip_is_of_the_kind_of_its_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("folder/", "")
        archive.writestr("folder/a.jsonl", lines("a", "b"))
    assert text_of(tmp_path / "a.zip") == "a\n\nb"
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("b.jsonl", "")
    with pytest.raises(UserError, match="holds 2 files instead of one"):
        text_of(tmp_path / "a.zip")


def test_an_empty_shard_is_passed_over(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b""), ("b.jsonl", lines("b")), ("c.jsonl", b"\n")):
        (tmp_path / name).write_bytes(content)
    assert text_of(tmp_path) == "b"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.csv", "a.parquet", "a.txt", "saved", "folder/a.jsonl"])
def test_calibration_reads_no_further_than_enough(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "ENOUGH", 500)
    texts = [f"w{number:03}" * 25 for number in range(300)]  # 100 characters each
    path = tmp_path / name
    if name == "a.txt":
        path.write_text("\n\n".join(texts))
    else:
        write_rows(path, [{"text": text} for text in texts])
    if name == "folder/a.jsonl":
        path = path.parent
        (path / "b.jsonl").write_text("this one is never opened")
    split = calibration_split(str(path))
    for wanted, documents in ((1, 5), (50, 8)):  # 16 characters for every token, and 500 at least
        whole = "\n\n".join(texts[:documents])
        if name == "a.txt":
            whole = "\n\n".join(texts)[: max(500, 16 * wanted)]
        assert load_corpus(str(path), split, wanted).text == whole
    if name != "folder/a.jsonl":
        assert text_of(path) == "\n\n".join(texts)


def test_arrow_files_in_both_formats(tmp_path: Path) -> None:
    (arrow,) = write_rows(tmp_path / "saved", [{"text": "a"}, {"text": "b"}]).glob("*.arrow")
    assert text_of(arrow) == "a\n\nb"
    for name in ("a.arrow", "a.feather"):  # the format with an index at its end
        feather.write_feather(pa.table({"text": ["a", "b"], "id": [1, 2]}), tmp_path / name)
        assert text_of(tmp_path / name) == "a\n\nb"


def test_the_split_and_the_column_are_options(tmp_path: Path, set_up: Any) -> None:
    folder = tmp_path / "corpus"
    for shift, split in enumerate(("train", "validation", "test")):
        write_rows(folder / f"{split}.jsonl", [{"title": "t", "body": make_text(900, shift)}])
    other = write_rows(tmp_path / "other.jsonl", [{"text": make_text(900, 9), "url": "u"}])
    build = partial(set_up, num_samples=5, column="body")
    chosen = build(str(folder), split="validation", eval_datasets=[str(folder), str(other)])
    named = build(f"{folder}:validation", eval_datasets=[])
    assert chosen.calibration.manifest.split == "validation"
    assert chosen.calibration.manifest.fingerprint == named.calibration.manifest.fingerprint
    assert [one.manifest["split"] for one in chosen.evaluation] == ["test", "all"]  # the other file has no such column
    with pytest.raises(UserError, match=r"--data\.split is test, but.*names validation"):
        build(f"{folder}:validation", split="test")
    with pytest.raises(UserError, match=r"no split 'dev'.*train, test, validation"):
        build(str(folder), split="dev")
    with pytest.raises(UserError, match=r"--data\.column body.*not there"):
        build(str(other), eval_datasets=[])
    plain = tmp_path / "plain.txt"
    plain.write_text(make_text(900, 9))
    assert build(str(folder), eval_datasets=[str(plain)]).evaluation
    with pytest.raises(UserError, match=r"--data\.column body.*plain text, which has no columns"):
        build(str(plain), eval_datasets=[])
