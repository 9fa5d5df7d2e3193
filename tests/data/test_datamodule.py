import hashlib
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lightning_prune.data import datamodule, streams, tokenization
from lightning_prune.data.calibration import fingerprint
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.support.errors import UserError
from tests.data.conftest import make_text


@pytest.fixture
def build(tokenizer_folder: str, text_file: str, tmp_path: Path) -> Any:
    def make(**options: Any) -> CalibrationDataModule:
        small = {"dataset": text_file, "num_samples": 11, "seq_len": 16, "eval_seq_len": 16, "eval_datasets": []}
        if str(options.get("dataset")).endswith(".npy"):  # 5 rows of 12: without a wish all of them are taken
            small |= {"num_samples": None, "seq_len": None}
        if any(name.endswith(".npy") for name in options.get("eval_datasets") or []):
            small |= {"eval_seq_len": None}
        return CalibrationDataModule(
            **{**small, "tokenizer": tokenizer_folder, "cache_dir": str(tmp_path / "cache"), **options}
        )

    return make


@pytest.fixture
def split_folder(tmp_path: Path) -> str:
    rows = {
        name: datasets.Dataset.from_dict({"text": [make_text(2000, shift)]})
        for shift, name in enumerate(("train", "validation", "test"))
    }
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "corpus")
    return str(tmp_path / "corpus")


@pytest.fixture
def array_file(tmp_path: Path) -> str:
    np.save(tmp_path / "tokens.npy", np.arange(60, dtype=np.int64).reshape(5, 12))
    return str(tmp_path / "tokens.npy")


def calibrated(data: CalibrationDataModule) -> torch.Tensor:
    data.setup("fit")
    return data.calibration.tokens


def explode(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("must not be called")


def test_defaults_are_the_unified_setting() -> None:
    data = CalibrationDataModule()
    assert (data.num_samples, data.seq_len, data.batch_size, data.sampling, data.seed) == (128, 128, 4, "random", 0)
    assert (data.eval_seq_len, data.eval_batch_size, data.source) == (128, 16, "demo")
    assert CalibrationDataModule(tokenizer="meta-llama/Llama-3.2-1B").source == "wikitext2"
    assert CalibrationDataModule(tokenizer=str(datamodule.demo_model_path())).source == "demo"


def test_cache_follows_xdg_unless_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CalibrationDataModule().cache_dir == tmp_path / "lightning_prune"
    assert CalibrationDataModule(cache_dir="elsewhere").cache_dir == Path("elsewhere")


def test_tokens_and_manifest_of_a_text_follow_from_text_tokenizer_and_seed(build: Any, text_file: str) -> None:
    data = build(seed=5)
    tokens = calibrated(data)
    text = Path(text_file).read_text()
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    stream = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    order = torch.randperm(len(stream) // 16, generator=torch.Generator().manual_seed(5)).tolist()
    assert tokens.tolist() == [stream[16 * i : 16 * i + 16] for i in order[:11]]
    assert tokens.dtype == torch.int64
    assert data.calibration.manifest.to_json() == {
        "dataset": text_file,
        "configuration": None,
        "split": "all",
        "revision": None,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "sampling": "random",
        "stride": None,
        "seed": 5,
        "num_samples": 11,
        "seq_len": 16,
        "fingerprint": hashlib.sha256(b"11,16\n" + tokens.numpy().astype("<i8").tobytes()).hexdigest(),
    }


def test_batch_size_and_workers_do_not_change_the_tokens(build: Any) -> None:
    expected = calibrated(build())
    for batch_size in (1, 2, 4, 7, 100):
        data = build(batch_size=batch_size)
        data.setup("fit")
        batches = list(data.train_dataloader())
        assert torch.equal(torch.cat([ids for ids, _, _ in batches]), expected)
        assert all(weight.dtype == torch.float32 and bool((weight == 1).all()) for _, weight, _ in batches)
        assert torch.cat([index for _, _, index in batches]).tolist() == list(range(len(expected)))
        assert [len(ids) for ids, _, _ in batches][:-1] == [batch_size] * (len(batches) - 1)
    loader = DataLoader(data.train_dataloader().dataset, batch_size=3, num_workers=2)
    assert torch.equal(torch.cat([ids for ids, _, _ in loader]), expected)


def test_seed_matters_to_random_sampling_only(build: Any) -> None:
    assert not torch.equal(calibrated(build(seed=0)), calibrated(build(seed=1)))
    for options in ({"sampling": "sequential"}, {"sampling": "sliding", "stride": 5}):
        first, second = build(seed=0, **options), build(seed=1, **options)
        assert torch.equal(calibrated(first), calibrated(second))
        assert first.calibration.manifest.seed is None
        assert first.calibration.manifest.stride == options.get("stride")


def test_global_seed_does_not_change_the_tokens(build: Any) -> None:
    torch.manual_seed(1)
    first = calibrated(build())
    torch.manual_seed(2)
    assert torch.equal(first, calibrated(build()))


def test_a_tilde_is_the_home_folder(
    build: Any, text_file: str, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell expands it in a word of its own only, and nothing does in a configuration."""
    monkeypatch.setenv("HOME", str(Path(text_file).parent))
    text = f"~/{Path(text_file).name}"
    folder = os.path.join("~", os.path.relpath(tokenizer_folder, Path(text_file).parent))
    data = build(dataset=text, eval_datasets=[text], tokenizer=folder)
    torch.testing.assert_close(calibrated(data), calibrated(build()))
    assert [one.manifest["dataset"] for one in data.evaluation] == [text_file]
    with pytest.raises(
        UserError, match=r"--data\.dataset: '~nobody-here/a\.txt' begins with the home folder of a user"
    ):
        build(dataset="~nobody-here/a.txt")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_padding_has_weight_zero_and_ranks_see_every_sample_once(build: Any, world_size: int) -> None:
    data = build(batch_size=2)
    tokens = calibrated(data)
    ranks = []
    for rank in range(world_size):
        data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank)
        loader = data.train_dataloader()
        assert len(loader.dataset) == {1: 11, 2: 12, 3: 12}[world_size]
        ranks.append(list(loader))
        assert [ids.tolist() for ids, _, _ in loader] == [
            ids.tolist() for ids, _, _ in ranks[-1]
        ]  # same in every epoch
    assert len({len(batches) for batches in ranks}) == 1
    kept = [ids[weight > 0] for batches in ranks for ids, weight, _ in batches]
    assert sorted(torch.cat(kept).tolist()) == sorted(tokens.tolist())
    padding = [ids[weight == 0] for batches in ranks for ids, weight, _ in batches]
    assert all(torch.equal(row, tokens[0]) for row in torch.cat(padding))
    for rank, batches in enumerate(ranks):  # a sample's index says where it stands in the shared set
        index = torch.cat([where for _, _, where in batches])
        assert index.tolist() == list(range(rank, len(index) * world_size, world_size))
        for ids, weight, where in batches:
            assert torch.equal(ids[weight > 0], tokens[where[weight > 0]])


def test_evaluation_windows_cover_the_held_out_split_once(build: Any, split_folder: str) -> None:
    data = build(dataset=split_folder, eval_datasets=None, eval_batch_size=4)
    data.setup("fit")
    (held_out,) = data.evaluation
    text = make_text(2000, 2)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    stream = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    count = len(stream) // 16
    assert held_out.name == "corpus"
    assert held_out.tokens.flatten().tolist() == stream[: count * 16]
    expected = {"dataset": split_folder, "split": "test", "seq_len": 16, "stride": 16, "bos": "none"}
    expected |= {"windows": count, "predicted_tokens": count * 15, "fingerprint": fingerprint(held_out.tokens)}
    expected |= {"text_sha256": hashlib.sha256(text.encode()).hexdigest()}
    assert expected.items() <= held_out.manifest.items()
    (loader,) = data.test_dataloader()
    assert torch.equal(torch.cat([ids for ids, _, _ in loader]), held_out.tokens)
    assert sum(float(weight.sum()) for _, weight, _ in loader) == count


def test_evaluation_sets_select_splits_and_keep_distinct_names(
    build: Any, split_folder: str, text_file: str, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "corpus.txt"
    other.write_text(make_text(500, 9))
    specs = [f"{split_folder}:validation", f"{split_folder}:test", text_file, str(other)]
    data = build(dataset=f"{split_folder}:train", eval_datasets=specs)
    data.setup("fit")
    assert [one.name for one in data.evaluation] == [
        "corpus:validation",
        "corpus",
        f"{Path(text_file).parent.name}/corpus.txt",
        "other/corpus.txt",
    ]
    assert [one.manifest["split"] for one in data.evaluation] == ["validation", "test", "all", "all"]
    with pytest.raises(UserError, match="twice"):
        build(eval_datasets=[str(other), text_file, text_file]).setup("fit")


def test_a_token_array_is_used_without_any_tokenizer(
    build: Any, array_file: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any
) -> None:
    monkeypatch.setattr(streams, "load_tokenizer", explode)
    monkeypatch.setattr(datamodule, "rank_zero_warn", print)
    data = build(dataset=array_file, eval_datasets=None, tokenizer="/no/such/folder")
    assert torch.equal(calibrated(data), torch.arange(60).view(5, 12))
    manifest = data.calibration.manifest
    assert (manifest.sampling, manifest.num_samples, manifest.seq_len) == ("given", 5, 12)
    assert (manifest.tokenizer_sha256, manifest.text_sha256, manifest.seed) == (None, None, None)
    assert data.evaluation == []
    assert data.test_dataloader() == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "--data.eval_datasets" in lines[0]


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({}, (5, 12)),
        ({"num_samples": 3}, (3, 12)),
        ({"seq_len": 4}, (5, 4)),
        ({"num_samples": 1, "seq_len": 12}, (1, 12)),
    ],
)
def test_of_a_token_array_the_first_part_that_is_asked_for_is_taken(
    build: Any, array_file: str, asked: dict[str, int], shape: tuple[int, int]
) -> None:
    data = build(dataset=array_file, **asked)
    tokens = calibrated(data)
    assert torch.equal(tokens, torch.arange(60).view(5, 12)[: shape[0], : shape[1]])
    manifest = data.calibration.manifest
    assert (manifest.num_samples, manifest.seq_len) == shape
    assert manifest.fingerprint == fingerprint(tokens)
    assert [len(batch[0][0]) for batch in [next(iter(data.train_dataloader()))]] == [shape[1]]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"num_samples": 6}, r"--data\.num_samples: found 6, .* 5 rows of 12 tokens: ask for at most 5"),
        ({"num_samples": 128}, r"--data\.num_samples: found 128"),
        ({"seq_len": 13}, r"--data\.seq_len: found 13, .* at most 12"),
        ({"sampling": "sliding", "stride": 3}, r"--data\.sampling sliding has no meaning for the token array"),
    ],
)
def test_more_than_a_token_array_holds_is_refused(
    build: Any, array_file: str, asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        build(dataset=array_file, **asked).setup("fit")


@pytest.mark.parametrize(("asked", "length"), [(None, 12), (12, 12), (4, 4)])
def test_of_an_evaluation_array_the_length_that_is_asked_for_is_taken(
    build: Any, array_file: str, asked: int | None, length: int
) -> None:
    data = build(eval_datasets=[array_file], eval_seq_len=asked)
    data.setup("test")
    (held_out,) = data.evaluation
    assert torch.equal(held_out.tokens, torch.arange(60).view(5, 12)[:, :length])
    assert (held_out.manifest["seq_len"], held_out.manifest["predicted_tokens"]) == (length, 5 * (length - 1))


def test_longer_windows_than_an_evaluation_array_has_are_refused(build: Any, array_file: str) -> None:
    with pytest.raises(UserError, match=r"--data\.eval_seq_len: found 13, .* 5 rows of 12 tokens: ask for at most 12"):
        build(eval_datasets=[array_file], eval_seq_len=13).setup("test")


def test_a_token_array_evaluates_without_any_tokenizer(
    build: Any, array_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "load_tokenizer", explode)
    np.save(tmp_path / "held.npy", np.arange(21, dtype=np.int64).reshape(3, 7))
    data = build(dataset=array_file, eval_datasets=[str(tmp_path / "held.npy")])
    data.setup("fit")
    (held_out,) = data.evaluation
    assert held_out.name == "held.npy"
    assert held_out.tokens.shape == (3, 7)
    assert (held_out.manifest["seq_len"], held_out.manifest["predicted_tokens"]) == (7, 18)
    with pytest.raises(UserError, match="no splits"):
        build(dataset=f"{array_file}:test").setup("fit")


def test_a_text_without_held_out_split_says_so_in_one_line(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(datamodule, "rank_zero_warn", lines.append)
    data = build(eval_datasets=None)
    data.prepare_data()
    data.setup("fit")
    assert data.evaluation == []
    assert len(lines) == 1
    assert "no held-out split" in lines[0]


def test_a_method_without_calibration_never_opens_the_dataset(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "load_corpus", explode)
    monkeypatch.setattr(streams, "load_tokenizer", explode)
    data = build()
    data.needs_calibration = False
    data.prepare_data()
    data.setup("fit")
    with pytest.raises(RuntimeError, match="no calibration set"):
        _ = data.calibration


def test_evaluation_alone_never_opens_the_calibration_split(
    build: Any, split_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    load = streams.load_corpus
    monkeypatch.setattr(
        streams, "load_corpus", lambda dataset, split, wanted: opened.append(split) or load(dataset, split)
    )
    data = build(dataset=split_folder, eval_datasets=None)
    data.setup("test")
    assert opened == ["test"]
    data.setup("fit")
    data.setup("fit")
    assert opened == ["test", "train"]


def test_a_second_run_finds_the_tokens_in_the_cache(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = calibrated(build())
    monkeypatch.setattr(tokenization, "tokenize", explode)
    assert torch.equal(calibrated(build()), first)


def test_c4_is_told_how_many_tokens_are_wanted(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[Any] = []

    def load(dataset: str, split: str, tokens_wanted: int | None) -> Any:
        wanted.append((dataset, split, tokens_wanted))
        return SimpleNamespace(dataset=dataset, configuration="en", split=split, revision=None, text=make_text(3000))

    monkeypatch.setattr(streams, "load_corpus", load)
    build(dataset="c4").setup("fit")
    build(dataset="c4", sampling="sliding", stride=4).setup("fit")
    assert wanted == [("c4", "train", 11 * 16), ("c4", "train", 10 * 4 + 16)]


def test_calibrating_on_the_evaluation_text_warns(
    build: Any, split_folder: str, text_file: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(text_file).read_bytes())
    for dataset, evaluated in (
        (text_file, text_file),
        (text_file, str(copy)),
        (split_folder, f"{split_folder}:train"),
        (f"{split_folder}:test", split_folder),
    ):
        with pytest.warns(UserWarning, match=r"calibrated on.*--data\.eval_datasets"):
            build(dataset=dataset, eval_datasets=[evaluated]).setup("fit")


def test_the_same_token_array_under_another_name_warns(build: Any, array_file: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.npy"
    copy.write_bytes(Path(array_file).read_bytes())
    with pytest.warns(UserWarning, match=r"copy\.npy.*calibrated on"):
        build(dataset=array_file, eval_datasets=[str(copy)]).setup("fit")


def test_a_held_out_split_does_not_warn(build: Any, split_folder: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        build(dataset=split_folder, eval_datasets=None).setup("fit")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_samples": 0}, "--data.num_samples is 0.*at least 1"),
        ({"seq_len": 1}, "--data.seq_len is 1.*at least 2"),
        ({"eval_seq_len": 1}, "--data.eval_seq_len is 1"),
        ({"batch_size": 0}, "--data.batch_size is 0"),
        ({"eval_batch_size": -1}, "--data.eval_batch_size is -1"),
        ({"seed": -1}, "--data.seed is -1"),
        ({"sampling": "best"}, "--data.sampling is 'best'.*sliding"),
        ({"sampling": "sliding"}, "needs --data.stride"),
        ({"sampling": "sliding", "stride": 0}, "--data.stride is 0"),
        ({"stride": 4}, "--data.stride 4.*--data.sampling sliding"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CalibrationDataModule(**options)


def test_too_little_text_names_the_options(build: Any, text_file: str) -> None:
    with pytest.raises(UserError, match=r"160000 are needed.*--data\.num_samples.*--data\.seq_len.*--data\.dataset"):
        build(num_samples=10000).setup("fit")
    with pytest.raises(UserError, match=r"one window needs 100000.*--data\.eval_seq_len"):
        build(eval_datasets=[text_file], eval_seq_len=100000).setup("test")


def test_text_with_a_model_folder_without_tokenizer_offers_a_token_array(build: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.*token array"):
        build(tokenizer=str(tmp_path)).setup("fit")


def test_ids_outside_the_vocabulary_are_refused(build: Any, array_file: str, tmp_path: Path) -> None:
    data = build(dataset=array_file)
    data.setup("fit")
    data.check_against_model(vocab_size=60, max_positions=12)
    with pytest.raises(UserError, match=r"token id 59.*59 ids"):
        data.check_against_model(vocab_size=59, max_positions=None)
    np.save(tmp_path / "negative.npy", np.full((2, 4), -1))
    held_out = build(eval_datasets=[str(tmp_path / "negative.npy")])
    held_out.setup("test")
    with pytest.raises(UserError, match=r"negative\.npy.*token id -1.*--data\.eval_datasets"):
        held_out.check_against_model(vocab_size=300, max_positions=None)


def test_windows_beyond_the_models_positions_are_refused(build: Any, split_folder: str) -> None:
    data = build(dataset=split_folder, eval_datasets=None, seq_len=16, eval_seq_len=24)
    data.setup("fit")
    data.check_against_model(vocab_size=300, max_positions=24)
    with pytest.raises(UserError, match=r"24 tokens \(--data\.eval_seq_len\).*16 positions"):
        data.check_against_model(vocab_size=300, max_positions=16)
    with pytest.raises(UserError, match=r"16 tokens \(--data\.seq_len\).*8 positions"):
        data.check_against_model(vocab_size=300, max_positions=8)


def test_help_explains_every_option_and_yaml_lists_are_accepted() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CalibrationDataModule, "data")
    text = parser.format_help()
    for name in ("dataset", "num_samples", "stride", "eval_datasets", "cache_dir", "tokenizer"):
        line = text[text.rindex(f"  --data.{name} ") :].split("\n  --")[0]
        assert len(line) > 100, name
    parsed = parser.parse_args(["--data.eval_datasets=[]"])
    assert parsed.data.eval_datasets == []
    parsed = parser.parse_args(["--data.eval_datasets=[wikitext2:validation, ptb]", "--data.sampling=sequential"])
    assert parsed.data.eval_datasets == ["wikitext2:validation", "ptb"]


def test_a_trainer_hands_every_window_to_training_step(build: Any, split_folder: str, tmp_path: Path) -> None:
    class Collect(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.trained: list[torch.Tensor] = []
            self.tested = 0.0

        def training_step(self, batch: Any) -> None:
            ids, weight, _ = batch
            self.trained.append(ids[weight > 0])

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.tested += float(batch[1].sum())

        def configure_optimizers(self) -> None:
            return None

    data = build(dataset=split_folder, eval_datasets=None)
    module = Collect()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, datamodule=data)
    assert torch.equal(torch.cat(module.trained), data.calibration.tokens)
    fresh = build(dataset=split_folder, eval_datasets=None)
    trainer.test(module, datamodule=fresh)
    assert module.tested == len(fresh.evaluation[0].tokens)
    with pytest.raises(RuntimeError):
        _ = fresh.calibration
