"""Named corpora, and what a dataset may be called."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_prune.data.corpora import NAMES, calibration_split, held_out_split, load_corpus, split_spec
from lightning_prune.support.errors import UserError

COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"


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
    assert ("also the default of --data.dataset" in str(error.value)) is (dataset == "wikitext2")
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
