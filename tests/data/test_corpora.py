"""Named corpora and local files as text."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_prune.data.corpora import NAMES, calibration_split, held_out_split, load_corpus, split_spec
from lightning_prune.support.errors import UserError

COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"
DOCUMENTS = ["Grüße, one.", "two\nlines", "three"]
JOINED = "Grüße, one.\n\ntwo\nlines\n\nthree"


class Hub:
    """Stands in for `datasets.load_dataset` and keeps what was requested."""

    def __init__(self, column: str, documents: list[str], error: Exception | None = None) -> None:
        self.requests: list[tuple[tuple[Any, ...], dict[str, Any], bool]] = []
        self.read = 0
        self.column, self.documents, self.error = column, documents, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.requests.append((args, kwargs, datasets.are_progress_bars_disabled()))
        if kwargs.get("streaming"):
            return datasets.IterableDataset.from_generator(self.stream)
        rows = datasets.Dataset.from_list(list(self.stream()))
        rows.info.download_checksums = {f"hf://datasets/org/name@{COMMIT}/train.parquet": {}}
        return rows

    def stream(self) -> Any:
        for document in self.documents:
            self.read += 1
            yield {self.column: document}
        if self.error is not None:
            raise self.error


NUMBERS = [str(number) for number in range(5000)]
HUB = {
    # dataset, split, column, documents → what the hub is asked, and the text that comes of it
    "lines joined by a blank line": (
        ("wikitext2", "test", "text", ["", " = Title = \n", " Body . \n"]),
        (("Salesforce/wikitext",), {"name": "wikitext-2-raw-v1", "split": "test"}),
        "\n\n = Title = \n\n\n Body . \n",
    ),
    "the parquet conversion, sentences joined by a space": (
        ("ptb", "validation", "sentence", ["no it was n't", "black monday"]),
        (("ptb-text-only/ptb_text_only",), {"revision": "refs/convert/parquet", "split": "validation"}),
        "no it was n't black monday",
    ),
    "25 tokens at 16 characters each": (
        ("c4", "train", "text", ["x" * 100] * 1000),
        (("allenai/c4",), {"name": "en", "split": "train", "streaming": True}),
        " ".join(["x" * 100] * 4),
    ),
    "the first 1100 documents": (
        ("c4", "validation", "text", NUMBERS),
        (("allenai/c4",), {"name": "en", "split": "validation", "streaming": True}),
        " ".join(NUMBERS[:1100]),
    ),
}


@pytest.mark.parametrize("case", HUB)
def test_hub_corpora_are_read_as_the_papers_read_them(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (dataset, split, column, documents), (args, options), text = HUB[case]
    hub = Hub(column, documents)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    shown = datasets.are_progress_bars_disabled()
    corpus = load_corpus(dataset, split, tokens_wanted=25)
    assert hub.requests == [(args, options, True)]
    assert (corpus.text, corpus.split, datasets.are_progress_bars_disabled()) == (text, split, shown)
    if "streaming" not in options:
        assert corpus.revision == COMMIT
    elif split == "train":
        assert hub.read == 4


@pytest.mark.parametrize("dataset", ["wikitext2", "c4"])
def test_hub_failure_is_one_message_that_offers_a_local_file(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", Hub("text", ["a"], ConnectionError("no route\nand a second line")))
    with pytest.raises(UserError) as error:
        load_corpus(dataset, "train", 1000)
    for word in (dataset, "ConnectionError: no route", "HF_HUB_OFFLINE", "--data.dataset", ".parquet"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_default_splits() -> None:
    assert [held_out_split(name) for name in ("demo", "wikitext2", "ptb", "c4")] == ["test"] * 3 + ["validation"]
    assert {calibration_split(name) for name in NAMES} == {"train"}
    assert load_corpus("demo", "validation").text != load_corpus("demo", "test").text


def test_wrong_names_and_splits_say_what_is_allowed() -> None:
    with pytest.raises(UserError) as error:
        calibration_split("wikitext")
    for word in ("Did you mean 'wikitext2'?", "demo", "ptb", "c4", ".jsonl", ".npy", "save_to_disk", "--data.dataset"):
        assert word in str(error.value)
    with pytest.raises(UserError, match=r"no/such/text\.txt.*exists"):
        held_out_split("no/such/text.txt")
    with pytest.raises(UserError, match=r"no split 'dev'.*train, validation, test"):
        load_corpus("wikitext2", "dev")


def test_split_spec_leaves_existing_paths_alone(tmp_path: Path) -> None:
    odd = tmp_path / "a:b"
    odd.write_text("x")
    assert split_spec(str(odd)) == (str(odd), None)
    assert split_spec("wikitext2:validation") == ("wikitext2", "validation")
    assert split_spec("wikitext2") == ("wikitext2", None)
    assert split_spec("C:\\texts\\a.txt") == ("C:\\texts\\a.txt", None)


def write(path: Path, rows: dict[str, list[Any]]) -> Path:
    """One table in the kind of file the name asks for."""
    table = datasets.Dataset.from_dict(rows)
    lines = "".join(json.dumps(row) + "\n" for row in table.to_list()).encode()
    contents = {".jsonl": lines, ".json": json.dumps(table.to_list(), indent=1).encode(), ".gz": gzip.compress(lines)}
    if path.suffix in contents:
        path.write_bytes(contents[path.suffix])
    else:
        {".parquet": table.to_parquet, ".csv": table.to_csv, "": table.save_to_disk}[path.suffix](path)
    return path


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "a.json.gz", "a.csv", "a.parquet", "a_folder"])
def test_every_table_finds_its_text_column(tmp_path: Path, kind: str) -> None:
    ids = {"id": [1, 2, 3]}
    tables: dict[str, tuple[dict[str, list[Any]], str]] = {
        "text": (ids | {"text": DOCUMENTS, "url": ["u", "v", "w"]}, JOINED),
        "sentence": (ids | {"sentence": DOCUMENTS}, JOINED),
        "whatever": (ids | {"whatever": DOCUMENTS}, JOINED),
        "missing": ({"text": ["one", None, "two"]}, "one\n\ntwo"),
    }
    for name, (rows, text) in tables.items():
        (tmp_path / name).mkdir()
        assert load_corpus(str(write(tmp_path / name / kind, rows)), "all").text == text
    path = write(tmp_path / kind, {"title": DOCUMENTS, "body": DOCUMENTS, **ids})
    with pytest.raises(UserError, match=r"title.*body.*id.*--data\.dataset"):
        load_corpus(str(path), "all")


def test_rows_of_a_file_may_differ(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "x": 1},
        {"text": "b", "x": "s"},
        {"text": None},
        {"y": [1, {"z": 2}], "text": "c"},
        {"y": []},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert load_corpus(str(tmp_path / "a.jsonl"), "all").text == "a\n\nb\n\nc"


def test_saved_splits_are_separate_corpora_with_a_revision(tmp_path: Path) -> None:
    rows = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "validation")}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "d")
    folder = str(tmp_path / "d")
    assert (calibration_split(folder), held_out_split(folder)) == ("train", "validation")
    train, held_out = load_corpus(folder, "train"), load_corpus(folder, "validation")
    assert (train.text, held_out.text) == ("train", "validation")
    assert train.revision
    assert train.revision != held_out.revision
    with pytest.raises(UserError, match=r"no split 'test'.*train, validation"):
        load_corpus(folder, "test")

    datasets.DatasetDict({"dev": rows["train"]}).save_to_disk(tmp_path / "dev")
    with pytest.raises(UserError, match=r"no train.*:dev"):
        calibration_split(str(tmp_path / "dev"))


BROKEN = {
    "a.jsonl": (b'{"text": "x"}\n{oops\n', "line 2"),
    "null.jsonl": (b"null\n", "line 1"),
    "surrogate.jsonl": (b'{"text": "a\\ud83db"}\n', "surrogate"),
    "empty.jsonl": (b"", "holds no text"),
    "a.json.gz": (b"not gzip", "cannot read.*a.json.gz"),
    "a.parquet": (b"not parquet", "cannot read.*a.parquet"),
    "a.txt": ("Grüße".encode("latin-1"), "cannot read.*utf-8.*iconv -f latin1 -t utf-8"),
    "b.txt": (b"\xff\xfe\xfa", "cannot read.*utf-16"),
    "a.pdf": (b"%PDF", r"unknown kind.*\.txt"),
    "state.json": (b"{", "cannot read"),  # the folder
    "config.json": (b"{}", "cannot read|cannot tell"),  # the folder
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_and_folders_are_one_message(tmp_path: Path, name: str, capfd: Any) -> None:
    content, words = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    if name in ("state.json", "config.json"):
        path = tmp_path
    with pytest.raises(UserError) as error:
        load_corpus(str(path), calibration_split(str(path)))
    assert re.search(words, str(error.value))
    assert "--data.dataset" in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
