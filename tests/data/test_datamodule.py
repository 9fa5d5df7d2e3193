import hashlib
import os
import re
import shutil
import warnings
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from transformers import AutoTokenizer

from lightning_prune.calibration.driver import CalibrationDriver
from lightning_prune.data import datamodule, streams
from lightning_prune.data.calibration import fingerprint
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.support.errors import UserError
from lightning_prune.support.progress import Progress
from lightning_prune.support.timing import Seconds
from tests.data.conftest import make_text, write_rows

ARRAY = torch.arange(60).view(5, 12)
WHOLE: dict[str, Any] = {"num_samples": None, "seq_len": None, "eval_seq_len": None}  # of an array


@pytest.fixture
def split_folder(tmp_path: Path) -> str:
    for shift, name in enumerate(("train", "validation", "test")):
        write_rows(tmp_path / "corpus" / f"{name}.jsonl", [{"text": make_text(2000, shift)}])
    return str(tmp_path / "corpus")


@pytest.fixture
def array_file(tmp_path: Path) -> str:
    np.save(tmp_path / "tokens.npy", ARRAY.numpy())
    return str(tmp_path / "tokens.npy")


def test_defaults_are_the_unified_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = CalibrationDataModule()
    assert (data.num_samples, data.seq_len, data.batch_size, data.sampling, data.seed) == (128, 128, 4, "random", 0)
    assert (data.eval_seq_len, data.eval_batch_size, data.source) == (128, 16, "demo")
    assert data.cache_dir == tmp_path / "lightning_prune"
    assert CalibrationDataModule(cache_dir="elsewhere").cache_dir == Path("elsewhere")
    assert CalibrationDataModule(tokenizer="meta-llama/Llama-3.2-1B").source == "wikitext2"
    assert CalibrationDataModule(tokenizer=str(datamodule.demo_model_path())).source == "demo"


def test_the_demo_set_is_the_one_that_results_were_published_on(tmp_path: Path) -> None:
    """Frozen on purpose: text, tokenizer, sampling and fingerprint of the default, all in one."""
    data = CalibrationDataModule(cache_dir=str(tmp_path), bos="never", eval_datasets=[])
    data.setup("fit")
    assert data.calibration.manifest.fingerprint == "3531bacb1fefca12254d51435cbbf34a8fb1f9627dc024181c5b1136671334f2"


def test_tokens_and_manifest_of_a_text_follow_from_text_tokenizer_and_seed(set_up: Any, text_file: str) -> None:
    torch.manual_seed(1)  # of no effect
    data = set_up(seed=5)
    tokens = data.calibration.tokens
    text = Path(text_file).read_text()
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    stream = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    order = torch.randperm(len(stream) // 16, generator=torch.Generator().manual_seed(5)).tolist()
    assert tokens.tolist() == [stream[16 * i : 16 * i + 16] for i in order[:11]]
    assert tokens.dtype == torch.int64
    nothing = ("configuration", "revision", "stride", "rendering", "chat_template_sha256", "parts")
    expected = {"dataset": text_file, "split": "all", "sampling": "random", "seed": 5, "bos": "none"}
    expected |= {"num_samples": 11, "seq_len": 16}
    assert data.calibration.manifest.to_json() == dict.fromkeys(nothing) | expected | {
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "fingerprint": hashlib.sha256(b"11,16\n" + tokens.numpy().astype("<i8").tobytes()).hexdigest(),
    }


@pytest.mark.parametrize(("sampling", "stride"), [("random", None), ("sequential", None), ("sliding", 5)])
def test_seed_matters_to_random_sampling_only(set_up: Any, sampling: str, stride: int | None) -> None:
    first, second = (set_up(seed=seed, sampling=sampling, stride=stride).calibration for seed in (3, 4))
    assert torch.equal(first.tokens, second.tokens) == (sampling != "random")
    seed = 3 if sampling == "random" else None
    assert (first.manifest.sampling, first.manifest.seed, first.manifest.stride) == (sampling, seed, stride)


def test_a_tilde_is_the_home_folder(
    set_up: Any, text_file: str, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell expands it in a word of its own only, and nothing does in a configuration."""
    monkeypatch.setenv("HOME", str(Path(text_file).parent))
    text = f"~/{Path(text_file).name}"
    folder = os.path.join("~", os.path.relpath(tokenizer_folder, Path(text_file).parent))
    data = set_up(text, eval_datasets=[text], tokenizer=folder)
    assert torch.equal(data.calibration.tokens, set_up().calibration.tokens)
    assert [one.manifest["dataset"] for one in data.evaluation] == [text_file]
    with pytest.raises(UserError, match=r"--data\.dataset: '~nobody-here/a\.txt'"):
        set_up("~nobody-here/a.txt")


# The whole set in one batch, and batches that come out even in none of these numbers of processes.
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (4, 1), (100, 1), (2, 1), (2, 2), (2, 3), (4, 2)])
def test_ranks_see_every_sample_once_in_any_batches_and_padding_weighs_nothing(
    set_up: Any, batch_size: int, world_size: int
) -> None:
    data = set_up(batch_size=batch_size)
    tokens = data.calibration.tokens
    assert torch.equal(tokens, set_up().calibration.tokens)
    seen: list[int] = []
    rows = -(-11 // world_size)
    for rank in range(world_size):
        data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank)
        loader = data.train_dataloader()
        assert len(loader) == -(-rows // batch_size)
        assert [len(batch[0]) for batch in loader][:-1] == [batch_size] * (len(loader) - 1)
        precision = SimpleNamespace(forward_context=None)
        trainer: Any = SimpleNamespace(**vars(data.trainer), precision_plugin=precision)
        driver = CalibrationDriver(
            trainer, cast(Any, SimpleNamespace(views=[])), tokens, batch_size, None, Progress(False), Seconds()
        )
        assert driver.setting.rows == rows  # no row of a residual store is left that no batch fills
        ids, weight, index = (torch.cat(part) for part in zip(*loader, strict=True))
        assert torch.equal(ids, torch.cat([batch[0] for batch in loader]))  # every epoch alike
        assert index.tolist() == list(range(rank, rows * world_size, world_size))
        assert torch.equal(ids[weight > 0], tokens[index[weight > 0]])
        assert all(torch.equal(row, tokens[0]) for row in ids[weight == 0])
        seen += index[weight > 0].tolist()
    assert sorted(seen) == list(range(11))


def test_evaluation_windows_cover_the_held_out_split_once(set_up: Any, split_folder: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        data = set_up(split_folder, eval_datasets=None, eval_batch_size=4)
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
    set_up: Any, split_folder: str, text_file: str, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "corpus.txt"
    other.write_text(make_text(500, 9))
    specs = [f"{split_folder}:validation", f"{split_folder}:test", text_file, str(other)]
    data = set_up(f"{split_folder}:train", eval_datasets=specs)
    same = [f"{Path(text_file).parent.name}/corpus.txt", "other/corpus.txt"]
    assert [one.name for one in data.evaluation] == ["corpus:validation", "corpus", *same]
    assert [one.manifest["split"] for one in data.evaluation] == ["validation", "test", "all", "all"]


PARTS = [({}, 5, 12), ({"num_samples": 3}, 3, 12), ({"seq_len": 4}, 5, 4), ({"num_samples": 1, "seq_len": 12}, 1, 12)]


@pytest.mark.parametrize(("options", "rows", "length"), PARTS)
def test_of_a_token_array_the_requested_part_is_taken_without_any_tokenizer(
    set_up: Any, array_file: str, options: dict[str, int], rows: int, length: int
) -> None:
    options = WHOLE | {"eval_seq_len": options.get("seq_len")} | options
    data = set_up(array_file, eval_datasets=[array_file], tokenizer="/no/such/folder", **options)
    assert torch.equal(data.calibration.tokens, ARRAY[:rows, :length])
    manifest = data.calibration.manifest
    assert (manifest.sampling, manifest.num_samples, manifest.seq_len) == ("given", rows, length)
    assert (manifest.tokenizer_sha256, manifest.text_sha256, manifest.seed) == (None, None, None)
    assert manifest.fingerprint == fingerprint(ARRAY[:rows, :length])
    (held_out,) = data.evaluation
    assert held_out.name == "tokens.npy"
    assert torch.equal(held_out.tokens, ARRAY[:, :length])
    assert (held_out.manifest["seq_len"], held_out.manifest["predicted_tokens"]) == (length, 5 * (length - 1))
    # What else an array or a text does not hold is in tests/hostile.
    with pytest.raises(UserError, match=r"--data\.eval_seq_len: found 13, .* at most 12"):
        set_up(eval_datasets=[array_file], eval_seq_len=13)


def test_on_a_text_without_splits_nothing_is_evaluated_and_one_line_says_so(
    build: Any, recwarn: pytest.WarningsRecorder
) -> None:
    data = build(eval_datasets=None)
    data.prepare_data()
    data.setup("fit")
    assert (data.evaluation, data.test_dataloader()) == ([], [])
    (line,) = [str(one.message) for one in recwarn if one.category is UserWarning]
    assert re.search(r"no held-out split.*--data\.eval_datasets", line)


def test_only_what_a_stage_needs_is_opened_and_once(
    build: Any, split_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, int | None]] = []
    load = streams.load_corpus

    def watched(dataset: str, split: str, wanted: int | None, *more: Any) -> Any:
        opened.append((split, wanted))
        return load(dataset, split, wanted, *more)

    monkeypatch.setattr(streams, "load_corpus", watched)
    data = build(split_folder, eval_datasets=None)
    data.setup("test")
    assert opened == [("test", None)]
    data.setup("fit")
    data.setup("fit")
    build(split_folder, sampling="sliding", stride=4).setup("fit")
    assert opened[1:] == [("train", 11 * 16), ("train", 10 * 4 + 16)]  # c4 is streamed no further than that

    reads_weights_only = build()
    reads_weights_only.needs_calibration = False
    reads_weights_only.prepare_data()
    reads_weights_only.setup("fit")
    assert len(opened) == 3
    with pytest.raises(RuntimeError, match="no calibration set"):
        _ = reads_weights_only.calibration


def test_calibrating_on_the_evaluation_text_warns(
    set_up: Any, split_folder: str, text_file: str, array_file: str, tmp_path: Path
) -> None:
    copies = [shutil.copyfile(one, f"{tmp_path}/copy{Path(one).suffix}") for one in (text_file, array_file)]
    same = [(text_file, text_file), (split_folder, f"{split_folder}:train"), (f"{split_folder}:test", split_folder)]
    for dataset, evaluated in [*same, *zip((text_file, array_file), copies, strict=True)]:
        with pytest.warns(UserWarning, match=r"calibrated on.*--data\.eval_datasets"):
            set_up(dataset, eval_datasets=[evaluated], **WHOLE if dataset == array_file else {})


@pytest.mark.parametrize(
    ("options", "words"),
    [  # the seed is in tests/hostile
        ({"num_samples": 0}, "--data.num_samples: found 0.*1 or more"),
        ({"seq_len": 1}, "--data.seq_len: found 1.*2 or more"),
        ({"eval_seq_len": 1}, "--data.eval_seq_len: found 1"),
        ({"batch_size": 0}, "--data.batch_size: found 0"),
        ({"eval_batch_size": -1}, "--data.eval_batch_size: found -1"),
        ({"sampling": "best"}, "--data.sampling: found 'best'.*sliding"),
        ({"sampling": "sliding"}, "needs --data.stride"),
        ({"sampling": "sliding", "stride": 0}, "--data.stride: found 0"),
        ({"stride": 4}, "--data.stride 4.*--data.sampling sliding"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CalibrationDataModule(**options)


def test_ids_and_lengths_beyond_the_model_are_refused(build: Any, array_file: str, tmp_path: Path) -> None:
    np.save(tmp_path / "negative.npy", np.full((2, 4), -1))
    calibrated = build(array_file, **WHOLE)
    calibrated.setup("fit")
    calibrated.check_against_model(vocab_size=60, max_positions=12)
    negative, longer = (build(eval_datasets=[name], **WHOLE) for name in (str(tmp_path / "negative.npy"), array_file))
    for data, vocab_size, positions, words in (
        (calibrated, 59, None, r"token id 59.*59 ids.*--data\.dataset"),
        (calibrated, 60, 8, r"12 tokens \(--data\.seq_len\).*8 positions"),
        (negative, 300, None, r"negative\.npy.*token id -1.*--data\.eval_datasets"),
        (longer, 300, 8, r"12 tokens \(--data\.eval_seq_len\).*8 positions"),
    ):
        data.setup("test")
        with pytest.raises(UserError, match=words):
            data.check_against_model(vocab_size, positions)


def test_help_explains_every_option() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(CalibrationDataModule, "data")
    text = parser.format_help()
    for name in signature(CalibrationDataModule).parameters:
        line = text[text.rindex(f"  --data.{name} ") :].split("\n  --")[0]
        assert len(line) > 100, name


def test_fingerprint_tells_shapes_and_orders_apart_but_not_memory_layouts_and_integer_widths() -> None:
    variants = [ARRAY, ARRAY.view(4, 15), ARRAY.flip(0), ARRAY.flatten()]
    assert len({fingerprint(variant) for variant in variants}) == 4
    assert fingerprint(ARRAY.T.contiguous().T) == fingerprint(ARRAY) == fingerprint(ARRAY.to(torch.int32))
