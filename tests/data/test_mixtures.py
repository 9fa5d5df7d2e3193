"""Several texts in one calibration set, by shares of samples."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_prune.data import mixtures
from lightning_prune.data.calibration import fingerprint
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.recovery.data import RecoveryDataModule
from lightning_prune.support.errors import UserError
from tests.data.conftest import make_text, write_rows


@pytest.fixture
def build(set_up: Any, tmp_path: Path) -> Any:
    for shift, name in enumerate("ab"):
        (tmp_path / f"{name}.txt").write_text(make_text(1500 + 500 * shift, shift))
    for shift, split in enumerate(("train", "validation"), start=5):
        write_rows(tmp_path / "corpus" / f"{split}.jsonl", [{"text": make_text(1500, shift)}])
    return partial(set_up, seed=3)


def test_every_part_is_drawn_as_it_would_be_alone(build: Any, tmp_path: Path) -> None:
    specs = [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt", f"{tmp_path}/corpus:validation"]
    shares, counts = (0.5, 0.3, 0.2), (6, 3, 2)  # of 11: 5.5, 3.3, 2.2; the largest remainder gets the eleventh
    data = build([f"{spec}:{share}" for spec, share in zip(specs, shares, strict=True)])
    alone = [build(spec, num_samples=number).calibration for spec, number in zip(specs, counts, strict=True)]
    assert torch.equal(data.calibration.tokens, torch.cat([one.tokens for one in alone]))
    manifest = data.calibration.manifest.to_json()
    assert manifest["fingerprint"] == fingerprint(data.calibration.tokens)
    assert (manifest["num_samples"], manifest["sampling"], manifest["seed"]) == (11, "random", 3)
    assert manifest["dataset"] == f"[{specs[0]}:0.5, {specs[1]}:0.3, {specs[2]}:0.2]"
    for part, one, share in zip(manifest["parts"], alone, shares, strict=True):
        expected = one.manifest.to_json()
        assert part["share"] == share
        assert all(expected[key] == part[key] for key in ("split", "text_sha256", "num_samples", "fingerprint", "bos"))


def test_counts_are_the_largest_remainders_and_sum_to_the_samples() -> None:
    def of(shares: list[float], number: int) -> list[int]:
        return mixtures.counts([mixtures.Part(str(row), share) for row, share in enumerate(shares)], number)

    assert of([0.7, 0.3], 128) == [90, 38]  # 89.6 and 38.4
    assert of([0.5, 0.5], 7) == [4, 3]
    assert of([0.333, 0.333, 0.334], 128) == [43, 42, 43]  # 42.624, 42.624, 42.752; the earlier of two equal ones
    assert of([0.1] * 10, 100) == [10] * 10
    with pytest.raises(UserError, match=r"none would be from 1:0\.001.*--data\.num_samples"):
        of([0.999, 0.001], 100)


def test_wrong_shares_are_one_message() -> None:
    for specs, words in (
        (["a.txt:0.7", "b.txt:0.7"], r"sum to 1\.4"),
        (["a.txt:0.7", "b.txt"], "missing"),
        (["a.txt:1.5", "b.txt:-0.5"], "not above 0"),
        (["a.txt:nan", "b.txt:1"], "missing or not above 0"),
        (["a.txt:0.5", "a.txt:0.5"], "twice"),
        ([], "sum to 1"),
    ):
        with pytest.raises(UserError, match=words) as error:
            CalibrationDataModule(specs)
        assert "--data.dataset" in str(error.value)


def test_the_command_line_and_yaml_take_a_list_or_a_name() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(CalibrationDataModule, "data")
    given = parser.parse_args(["--data.dataset", "[a.jsonl:0.7, wikitext2:test:0.3]"]).data.dataset
    assert given == ["a.jsonl:0.7", "wikitext2:test:0.3"]
    assert [str(part) for part in CalibrationDataModule(given).parts] == given
    assert parser.parse_args(["--data.eval_datasets=[wikitext2:validation, ptb]"]).data.eval_datasets[1] == "ptb"
    for name in ("wikitext2:validation", "a.txt", "data/*.jsonl", "~/a b.txt"):
        assert parser.parse_args(["--data.dataset", name]).data.dataset == name


def test_evaluation_is_on_the_held_out_splits_and_knows_the_parts(build: Any, tmp_path: Path) -> None:
    mixture = [f"{tmp_path}/a.txt:0.5", f"{tmp_path}/corpus:0.5"]
    assert [one.name for one in build(mixture, eval_datasets=None).evaluation] == ["corpus"]
    with pytest.warns(UserWarning, match=r"a\.txt is the text the model was calibrated on"):
        build(mixture, eval_datasets=[f"{tmp_path}/a.txt"])


def test_training_takes_all_that_the_shares_allow_and_holds_out_of_every_text(build: Any, tmp_path: Path) -> None:
    a, b = (f"{tmp_path}/{name}.txt" for name in "ab")
    whole = [build(one, RecoveryDataModule, num_samples=None).calibration.tokens for one in (a, b)]
    data = build([f"{a}:0.75", f"{b}:0.25"], RecoveryDataModule, num_samples=None, held_out=0.1)
    number = int(min(len(whole[0]) / 0.75, len(whole[1]) / 0.25))
    counts = [part["num_samples"] for part in data.manifest["parts"]]
    assert sum(counts) == number
    held = [round(0.1 * count) for count in counts]
    expected = [text[: count - out] for text, count, out in zip(whole, counts, held, strict=True)]
    assert torch.equal(data.calibration.tokens[: -data.num_held_out], torch.cat(expected))
    expected = [text[count - out : count] for text, count, out in zip(whole, counts, held, strict=True)]
    assert torch.equal(data.calibration.tokens[-data.num_held_out :], torch.cat(expected))
