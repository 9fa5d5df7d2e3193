from pathlib import Path

import pytest

from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.run import load_run
from tests.comparison.fake_run import write_run

OTHER = "9" * 64


def two_runs(tmp_path: Path, **changes: object) -> list:
    first = write_run(tmp_path, "wanda")
    second = write_run(tmp_path, "taylor", **changes)
    return [load_run(first), load_run(second)]


def test_runs_that_agree_in_every_fact_share_one_table(tmp_path: Path) -> None:
    result = audit(two_runs(tmp_path))
    assert result.fair
    assert [run.label for run in result.groups[0].runs] == ["wanda", "taylor"]
    assert len(result.groups) == 1


def test_given_tokens_are_the_same_set_whatever_file_they_came_in(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path, label, calibration={"sampling": "given", "dataset": f"/tmp/{label}.npy"}))
        for label in ("wanda", "taylor")
    ]
    assert audit(runs).fair
    corpora = [
        load_run(write_run(tmp_path, label, calibration={"dataset": label})) for label in ("magnitude", "slimgpt")
    ]
    assert [one.what for one in audit(corpora).differences] == ["calibration dataset"]


@pytest.mark.parametrize(
    ("changes", "named", "found"),
    [
        ({"calibration": {"fingerprint": OTHER}}, "calibration tokens (fingerprint)", "999999999999"),  # one token
        ({"calibration": {"fingerprint": OTHER, "seed": 1}}, "calibration seed", "1 in taylor"),
        ({"calibration": {"fingerprint": OTHER, "seq_len": 512}}, "calibration sequence length", "512 in taylor"),
        ({"calibration": {"fingerprint": OTHER, "num_samples": 64}}, "calibration samples", "64 in taylor"),
        ({"calibration": {"revision": "r2"}}, "calibration revision", "r2 in taylor"),
        ({"calibration": {"tokenizer_sha256": OTHER}}, "calibration tokenizer", "999999999999"),
        ({"evaluation": {"tokenizer_sha256": OTHER}}, "evaluation tokenizer of demo", "999999999999"),
        ({"evaluation": {"seq_len": 64}}, "evaluation sequence length of demo", "64 in taylor"),
        ({"evaluation": {"fingerprint": OTHER}}, "evaluation tokens (fingerprint) of demo", "999999999999"),
        ({"base_model": "other", "weights": OTHER}, "base model", "'other'"),
        ({"weights": OTHER}, "base model", "999999999999"),  # another model under the same name
        ({"weights": None, "base_model": "other"}, "base model", "other in taylor"),
        ({"masked": True}, "what the ratio counts", "weights set to zero in taylor"),
        ({"environment": {"precision": "bf16-true"}}, "precision", "bf16-true in taylor"),
    ],
)
def test_changed_fact_is_named_with_its_runs_and_set_apart(
    tmp_path: Path, changes: dict, named: str, found: str
) -> None:
    result = audit(two_runs(tmp_path, **changes))
    assert not result.fair
    line = next(str(item) for item in result.differences if item.what == named)
    assert found in line
    assert "wanda" in line
    assert len(result.groups) == 2


def test_same_weights_under_another_path_are_the_same_model(tmp_path: Path) -> None:
    assert audit(two_runs(tmp_path, base_model="/elsewhere/demo")).fair


def test_achieved_ratio_beyond_the_tolerance_stands_apart_in_its_group(tmp_path: Path) -> None:
    result = audit(two_runs(tmp_path, achieved=0.2102))
    assert not result.fair
    assert [run.label for run in result.groups[0].runs] == ["wanda"]
    assert [run.label for run in result.groups[0].other_ratio] == ["taylor"]
    assert "0.2102 instead of 0.2" in str(result.differences[0])
    assert audit(two_runs(tmp_path / "near", achieved=0.2098)).fair


def test_layer_granularity_is_given_as_the_reason(tmp_path: Path) -> None:
    text = str(audit(two_runs(tmp_path, achieved=0.25, whole_layers=True)).differences[0])
    assert "taylor: removes whole layers, one layer is 0.0100 of the model" in text


def test_method_without_data_joins_the_largest_group_and_says_so(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, "short", calibration={"fingerprint": OTHER}),
        write_run(tmp_path, "magnitude", no_data=True),
        write_run(tmp_path, "wanda"),
        write_run(tmp_path, "taylor"),
    ]
    result = audit([load_run(folder) for folder in folders])
    labels = [[run.label for run in group.runs] for group in result.groups]
    assert labels == [["magnitude", "wanda", "taylor"], ["short"]]
    assert any(note.startswith("magnitude: needs no calibration") for note in result.notes)
    assert all("magnitude" not in str(item) for item in result.differences)


def test_method_without_data_on_another_evaluation_stands_alone(tmp_path: Path) -> None:
    runs = two_runs(tmp_path, no_data=True, evaluation={"seq_len": 64})
    assert [[run.label for run in group.runs] for group in audit(runs).groups] == [["wanda"], ["taylor"]]


def test_other_software_is_a_note_and_separates_nobody(tmp_path: Path) -> None:
    result = audit(two_runs(tmp_path, environment={"packages": {"torch": "2.9.0"}}))
    assert result.fair
    assert any("torch version" in note and "2.9.0" in note for note in result.notes)
