from typing import Any

import datasets
import pytest

from lightning_prune.data import corpora
from lightning_prune.data.corpora import calibration_split, held_out_split, load_corpus, split_spec
from lightning_prune.support.errors import UserError

COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"


class Hub:
    """Stands in for `datasets.load_dataset` and keeps what it was asked for."""

    def __init__(self, column: str, documents: list[str]) -> None:
        self.asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.read = 0
        self.column, self.documents = column, documents

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append((args, kwargs))
        if not kwargs.get("streaming"):
            rows = datasets.Dataset.from_dict({self.column: self.documents})
            rows.info.download_checksums = {f"hf://datasets/org/name@{COMMIT}/train.parquet": {}}
            return rows
        return datasets.IterableDataset.from_generator(self.stream)

    def stream(self) -> Any:
        for document in self.documents:
            self.read += 1
            yield {self.column: document}


def use(monkeypatch: pytest.MonkeyPatch, hub: Any) -> Any:
    monkeypatch.setattr(datasets, "load_dataset", hub)
    return hub


def test_wikitext2_joins_its_lines_by_a_blank_line_and_keeps_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, Hub("text", ["", " = Title = \n", " Body . \n"]))
    corpus = load_corpus("wikitext2", "test")
    assert hub.asked == [(("Salesforce/wikitext",), {"name": "wikitext-2-raw-v1", "split": "test"})]
    assert corpus.text == "\n\n = Title = \n\n\n Body . \n"
    assert (corpus.configuration, corpus.split, corpus.revision) == ("wikitext-2-raw-v1", "test", COMMIT)


def test_the_datasets_library_shows_no_bars_and_may_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, silent = Hub("text", ["a"]), []

    def load(*args: Any, **kwargs: Any) -> Any:
        silent.append(datasets.are_progress_bars_disabled())
        return hub(*args, **kwargs)

    use(monkeypatch, load)
    for wanted in (datasets.enable_progress_bars, datasets.disable_progress_bars):
        wanted()
        before = datasets.are_progress_bars_disabled()
        load_corpus("wikitext2", "test")
        assert datasets.are_progress_bars_disabled() == before
    datasets.enable_progress_bars()
    assert silent == [True, True]


def test_ptb_reads_the_parquet_conversion_and_joins_sentences_by_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, Hub("sentence", ["no it was n't", "black monday"]))
    corpus = load_corpus("ptb", "validation")
    expected = {"revision": "refs/convert/parquet", "split": "validation"}
    assert hub.asked == [(("ptb-text-only/ptb_text_only",), expected)]
    assert corpus.text == "no it was n't black monday"
    assert corpus.configuration == "penn_treebank"


def test_c4_calibration_streams_only_as_many_documents_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, Hub("text", ["x" * 100] * 1000))
    corpus = load_corpus("c4", "train", tokens_wanted=25)
    assert hub.asked == [(("allenai/c4",), {"name": "en", "split": "train", "streaming": True})]
    assert corpus.text == " ".join(["x" * 100] * 4)  # 25 tokens at 16 characters each
    assert hub.read == 4


def test_c4_held_out_is_the_first_1100_validation_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, Hub("text", [str(number) for number in range(5000)]))
    corpus = load_corpus("c4", "validation")
    assert hub.asked == [(("allenai/c4",), {"name": "en", "split": "validation", "streaming": True})]
    assert corpus.text == " ".join(str(number) for number in range(1100))


def test_default_splits() -> None:
    assert [held_out_split(name) for name in ("demo", "wikitext2", "ptb", "c4")] == ["test"] * 3 + ["validation"]
    assert {calibration_split(name) for name in corpora.NAMES} == {"train"}


def test_hub_failure_is_one_message_that_offers_a_local_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub\nand a second line")

    use(monkeypatch, offline)
    with pytest.raises(UserError) as error:
        load_corpus("wikitext2", "train")
    message = str(error.value)
    for word in ("wikitext2", "Couldn't reach the Hub", "HF_HUB_OFFLINE", "--data.dataset", ".parquet"):
        assert word in message
    assert "\n" not in message


def test_failure_while_streaming_is_reported_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Hub):
        def stream(self) -> Any:
            yield {"text": "one"}
            raise TimeoutError("read timed out")

    use(monkeypatch, Broken("text", []))
    with pytest.raises(UserError, match=r"could not fetch c4 .*read timed out"):
        load_corpus("c4", "train", 1000)


def test_unknown_name_lists_the_names_and_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        calibration_split("wikitext")
    for word in ("did you mean wikitext2?", "demo", "ptb", "c4", ".jsonl", ".npy", "save_to_disk", "--data.dataset"):
        assert word in str(error.value)


def test_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"no/such/text\.txt.*exists"):
        held_out_split("no/such/text.txt")


def test_unknown_split_lists_the_splits() -> None:
    with pytest.raises(UserError, match=r"no split 'dev'.*train, validation, test"):
        load_corpus("wikitext2", "dev")


def test_split_spec_leaves_existing_paths_alone(tmp_path) -> None:  # type: ignore[no-untyped-def]
    odd = tmp_path / "a:b"
    odd.write_text("x")
    assert split_spec(str(odd)) == (str(odd), None)
    assert split_spec("wikitext2:validation") == ("wikitext2", "validation")
    assert split_spec("wikitext2") == ("wikitext2", None)
    assert split_spec("C:\\texts\\a.txt") == ("C:\\texts\\a.txt", None)


def test_demo_splits_differ() -> None:
    texts = {split: load_corpus("demo", split).text for split in ("validation", "test")}
    assert texts["validation"] != texts["test"]
    assert min(len(text) for text in texts.values()) > 1000
