import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_prune.data.corpora import calibration_split, held_out_split, load_corpus
from lightning_prune.data.local_files import local_splits, read_local
from lightning_prune.support.errors import UserError

DOCUMENTS = ["Grüße, one.", "two\nlines", "three"]
JOINED = "Grüße, one.\n\ntwo\nlines\n\nthree"


def json_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, rows: dict[str, list[Any]]) -> Path:
    """One table in the kind of file the name asks for."""
    table = datasets.Dataset.from_dict(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text(json_lines(table.to_list()), encoding="utf-8")
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(json_lines(table.to_list()).encode()))
    else:
        table.save_to_disk(path)
    return path


KINDS = ["a.jsonl", "a.json.gz", "a.parquet", "a_folder"]


def test_text_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(JOINED + "\n", encoding="utf-8")
    assert read_local(tmp_path / "a.txt", "all") == (JOINED + "\n", None)
    assert calibration_split(str(tmp_path / "a.txt")) == "all"
    assert held_out_split(str(tmp_path / "a.txt")) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["text", "sentence", "whatever"])
def test_every_table_finds_its_text_column(tmp_path: Path, kind: str, column: str) -> None:
    rows: dict[str, list[Any]] = {"id": [1, 2, 3], column: DOCUMENTS}
    if column == "text":
        rows["url"] = ["u", "v", "w"]
    text, _ = read_local(write(tmp_path / kind, rows), "all")
    assert text == JOINED


@pytest.mark.parametrize("kind", KINDS)
def test_two_unnamed_string_columns_are_refused_with_the_columns(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / kind, {"title": DOCUMENTS, "body": DOCUMENTS, "id": [1, 2, 3]})
    with pytest.raises(UserError, match=r"title.*body.*id.*--data\.dataset"):
        read_local(path, "all")


@pytest.mark.parametrize("kind", KINDS)
def test_missing_documents_are_left_out(tmp_path: Path, kind: str) -> None:
    assert read_local(write(tmp_path / kind, {"text": ["one", None, "two"]}), "all")[0] == "one\n\ntwo"


def test_saved_splits_are_separate_corpora_with_a_revision(tmp_path: Path) -> None:
    rows = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "validation")}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "d")
    folder = str(tmp_path / "d")
    assert local_splits(tmp_path / "d") == ["train", "validation"]
    assert (calibration_split(folder), held_out_split(folder)) == ("train", "validation")
    train, held_out = load_corpus(folder, "train"), load_corpus(folder, "validation")
    assert (train.text, held_out.text) == ("train", "validation")
    assert train.revision
    assert train.revision != held_out.revision
    with pytest.raises(UserError, match=r"no split 'test'.*train, validation"):
        load_corpus(folder, "test")


def test_saved_splits_without_train_must_be_chosen(tmp_path: Path) -> None:
    datasets.DatasetDict({"dev": datasets.Dataset.from_dict({"text": ["x"]})}).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match=r"no train.*:dev"):
        calibration_split(str(tmp_path / "d"))


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"no split 'test'.*leave the split out"):
        load_corpus(str(tmp_path / "a.txt"), "test")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{oops\n', "line 2.*not JSON"),
        ("a.jsonl", b'["x"]\n', "line 1.*list"),
        ("a.jsonl", b"", "text.*none"),
        ("a.json.gz", b"not gzip", "cannot read.*a.json.gz"),
        ("a.parquet", b"not parquet", "cannot read.*a.parquet"),
        ("a.txt", b"\xff\xfe\xfa", "cannot read.*utf-8"),
        ("a.pdf", b"%PDF", r"unknown kind.*\.txt"),
    ],
)
def test_broken_files_are_one_message(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_local(tmp_path / name, "all")
    assert "--data.dataset" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cut_off_gzip_is_one_message(tmp_path: Path) -> None:
    whole = gzip.compress(json_lines([{"text": str(i)} for i in range(1000)]).encode())
    (tmp_path / "a.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot read"):
        read_local(tmp_path / "a.json.gz", "all")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="save_to_disk"):
        read_local(tmp_path, "all")


def test_a_damaged_saved_folder_is_one_message(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", {"text": DOCUMENTS})
    (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        read_local(folder, "all")
