from dataclasses import replace
from pathlib import Path

import pytest

from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.records import Run
from lightning_prune.comparison.sections import sections, terminal
from tests.comparison.fake_run import make_run

OTHER = "9" * 64


def two_runs(root: Path, **changes: object) -> list[Run]:
    return [make_run(root, "wanda"), make_run(root, "taylor", **changes)]


def labels(runs: list[Run]) -> list[list[str]]:
    return [[run.label for run in group.runs] for group in audit(runs).groups]


@pytest.mark.parametrize("changes", [{}, {"base_model": "/elsewhere/demo"}])  # the same weights: the same model
def test_runs_that_agree_in_every_fact_share_one_table(tmp_path: Path, changes: dict) -> None:
    runs = two_runs(tmp_path, **changes)
    assert not audit(runs).differences
    assert labels(runs) == [["wanda", "taylor"]]


@pytest.mark.parametrize(("sampling", "differing"), [("given", []), ("random", ["calibration dataset"])])
def test_given_tokens_are_the_same_set_whatever_file_they_came_in(
    tmp_path: Path, sampling: str, differing: list[str]
) -> None:
    facts = [{"sampling": sampling, "dataset": f"/tmp/{number}.npy"} for number in range(2)]
    result = audit([make_run(tmp_path, calibration=one) for one in facts])
    assert [one.what for one in result.differences] == differing


@pytest.mark.parametrize(
    ("changes", "named", "found"),
    [
        ({"calibration": {"fingerprint": OTHER}}, "calibration tokens (fingerprint)", "999999999999"),  # one token
        ({"calibration": {"fingerprint": OTHER, "seed": 1}}, "calibration seed", "1 in taylor"),
        ({"calibration": {"fingerprint": OTHER, "seq_len": 512}}, "calibration sequence length", "512 in taylor"),
        ({"calibration": {"fingerprint": OTHER, "num_samples": 64}}, "calibration samples", "64 in taylor"),
        ({"calibration": {"revision": "r2"}}, "calibration revision", "r2 in taylor"),
        # The other run is from before the option.
        ({"calibration": {"bos": "every window"}}, "calibration BOS handling", "every window in taylor"),
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
    line = next(str(item) for item in result.differences if item.what == named)
    assert found in line
    assert "wanda" in line
    assert len(result.groups) == 2


def test_achieved_ratio_beyond_the_tolerance_is_apart_in_its_group(tmp_path: Path) -> None:
    result = audit(two_runs(tmp_path, achieved=0.2102))
    assert [run.label for run in result.groups[0].runs] == ["wanda"]
    assert [run.label for run in result.groups[0].other_ratio] == ["taylor"]
    assert "0.2102 instead of 0.2" in str(result.differences[0])
    assert not audit(two_runs(tmp_path / "near", achieved=0.2098)).differences
    text = str(audit(two_runs(tmp_path / "layers", achieved=0.25, whole_layers=True)).differences[0])
    assert "taylor: removes whole layers, one layer is 0.0100 of the model" in text


def test_method_without_data_joins_the_largest_group_of_its_evaluation_and_says_so(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "short", calibration={"fingerprint": OTHER}), make_run(tmp_path, no_data=True)]
    runs += two_runs(tmp_path)
    assert labels(runs) == [["wanda", "wanda", "taylor"], ["short"]]
    result = audit(runs)
    assert any(note.startswith("wanda: needs no calibration") for note in result.notes)
    assert all("wanda/version_0" not in str(item) for item in result.differences)
    alone = make_run(tmp_path, "magnitude", no_data=True, evaluation={"seq_len": 64})
    assert labels([*runs, alone])[-1] == ["magnitude"]


def test_other_software_is_a_note_and_separates_nobody(tmp_path: Path) -> None:
    result = audit(two_runs(tmp_path, environment={"packages": {"torch": "2.9.0"}}))
    assert not result.differences
    assert any("torch version" in note and "2.9.0" in note for note in result.notes)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"achieved": 0.195}, "taylor/version_0 0.2 removes 0.1950 of all parameters, wanda/version_0 0.2 0.2000"),
        ({"achieved": 0.199, "evaluation": {"calibration_overlap": 0.005}}, None),  # rounding, and chance
    ],
)
def test_what_gives_an_advantage_is_a_note(tmp_path: Path, changes: dict, note: str | None) -> None:
    found = audit(two_runs(tmp_path, **changes))
    assert not found.differences
    notes = [one for one in found.notes if "Not held out" in one or "sizes" in one]
    assert len(notes) == (note is not None)
    assert not note or note in notes[0]


def test_a_run_that_saw_the_evaluation_text_is_set_apart_and_named(tmp_path: Path) -> None:
    free = make_run(tmp_path, "magnitude", no_data=True)
    runs = [*two_runs(tmp_path, evaluation={"calibration_overlap": 0.4}), free]
    assert labels(runs) == [["wanda", "magnitude"], ["taylor"]]
    found = audit(runs)
    assert [one.what for one in found.differences] == ["evaluation text that was calibrated on"]
    assert "Not held out: demo holds text that was calibrated on by taylor/version_0 0.2." in found.notes


def test_the_text_that_was_calibrated_on_is_noted_in_old_runs_too(tmp_path: Path) -> None:
    same = {"text_sha256": "5" * 64}
    (run,) = [make_run(tmp_path, "wanda", calibration=same, evaluation=same)]
    (note,) = [one for one in audit([run]).notes if "Not held out" in one]
    assert terminal(sections(audit([run]), [])).count(note) == 2  # beside the best, and in the audit


def test_one_system_with_other_options_is_noted(tmp_path: Path) -> None:
    runs = [
        replace(make_run(tmp_path, "wanda", seed=seed), options={"allocation": allocation, "pruning_ratio": seed})
        for seed, allocation in enumerate(("global", "uniform"))
    ]
    (note,) = [one for one in audit(runs).notes if "other options" in one]
    assert "allocation: global in wanda/version_0 0.2; uniform in wanda/version_1 0.2" in note
