import csv
from pathlib import Path

import pytest

from lightning_prune.comparison.audit import Audit, audit
from lightning_prune.comparison.exports import latex, results_csv
from lightning_prune.comparison.repeats import Spread, repeats
from lightning_prune.comparison.sections import sections, terminal
from tests.comparison.fake_run import drawn, make_run, seeded


@pytest.fixture
def repeated(tmp_path: Path) -> Audit:
    runs = seeded(tmp_path, {"wanda": [12.0, 13.0, 14.0], "taylor": [11.0, 12.0, 13.0]})
    return audit([*runs, make_run(tmp_path, "magnitude", no_data=True, perplexity=20.0)])


def test_seeds_that_every_system_had_share_a_table_and_are_no_difference(repeated: Audit) -> None:
    (group,) = repeated.groups
    assert not repeated.differences
    assert [len(line.runs) for line in repeats(group.runs)] == [3, 3, 1]
    assert any(note.startswith("Calibration seeds 0, 1, 2: meant as repetitions") for note in repeated.notes)


def test_mean_deviation_and_number_are_in_every_format(repeated: Audit) -> None:
    text = terminal(sections(repeated, []))
    line = next(line for line in text.splitlines() if line.startswith("wanda"))
    assert line.split()[1:6] == ["0.2", "13.000", "±", "1.000", "3"]
    line = next(line for line in text.splitlines() if line.startswith("magnitude "))
    assert line.split()[1:4] == ["0.2", "20.000", "1"]
    assert "seeds 0, 1, 2" in text
    assert r"wanda & 13.000 $\pm$ 1.000 \\" in latex(repeated)
    rows = [row for row in csv.DictReader(results_csv(repeated, []).splitlines()) if row["system"] == "wanda"]
    assert {row["calibration_seed"]: row["perplexity"] for row in rows} == {"0": "12.0", "1": "13.0", "2": "14.0"}
    assert {(row["n"], row["perplexity_mean"], row["perplexity_sd"]) for row in rows} == {("3", "13.0", "1.0")}


def labels(result: Audit) -> list[list[str]]:
    return [[run.label for run in group.runs] for group in result.groups]


def test_what_is_no_repetition_is_apart(tmp_path: Path) -> None:
    """A seed that one system lacks; other tokens within one seed; the same seed twice."""
    result = audit(seeded(tmp_path / "lacks", {"wanda": [12.0, 13.0], "taylor": [11.0]}))
    assert labels(result) == [["wanda", "taylor"], ["wanda"]]
    assert any(item.what == "calibration seed" for item in result.differences)
    other = [make_run(tmp_path, "taylor", calibration=drawn(seed, "ab"[seed])) for seed in (0, 1)]
    result = audit([*seeded(tmp_path, {"wanda": [12.0, 13.0]}), *other])
    assert result.differences
    assert [set(group) for group in labels(result)] == [{"wanda"}, {"taylor"}]
    (group,) = audit([make_run(tmp_path), make_run(tmp_path)]).groups
    assert [len(line.runs) for line in repeats(group.runs)] == [1, 1]


def test_ratio_with_fewer_seeds_keeps_them_for_all(tmp_path: Path) -> None:
    runs = seeded(tmp_path, {"wanda": [12.0, 13.0], "taylor": [11.0, 12.0]})
    result = audit([*runs, *seeded(tmp_path, {"wanda": [30.0], "taylor": [31.0]}, ratio=0.5)])
    assert not result.differences
    assert [len(line.runs) for line in repeats(result.groups[0].runs)] == [2, 2, 1, 1]


def test_system_that_missed_its_ratio_with_one_seed_is_apart_with_all(tmp_path: Path) -> None:
    runs = seeded(tmp_path, {"wanda": [12.0, 13.0], "short": [11.0]})
    (group,) = audit([*runs, make_run(tmp_path, "short", achieved=0.25, calibration=drawn(1))]).groups
    assert {run.label for run in group.runs} == {"wanda"}
    assert [run.label for run in group.other_ratio] == ["short", "short"]


def test_one_value_that_is_not_finite_leaves_no_mean(tmp_path: Path) -> None:
    (line,) = repeats(audit(seeded(tmp_path, {"wanda": [12.0, None]})).groups[0].runs)
    assert (line.perplexity("demo").mean, line.verdict("demo")) == (None, "unusable")
    for values in ((1.0,), (1.0, None), (None,), (float("inf"), 2.0)):
        assert Spread.of(values).deviation is None
