import csv
import io
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.comparison import costs
from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.exports import results_csv
from lightning_prune.comparison.records import Run
from lightning_prune.comparison.repeats import repeats
from lightning_prune.comparison.sections import sections, terminal
from lightning_prune.comparison.tables import results
from tests.comparison.fake_run import make_run

SECONDS = {"load": 10.0, "tokenise": 20.0, "evaluate dense": 30.0, "calibrate": 4.0, "prune layers": 0.5}
SECONDS |= {"decide": 0.25, "prune": 1.0, "save": 2.0, "evaluate pruned": 3.0, "total": 80.0}
REUSED = {phase: value for phase, value in SECONDS.items() if phase not in ("calibrate", "evaluate dense")}


def timed(
    root: Path, seconds: dict[str, float], measured_by: Path | None = None, known: bool = True, **options: Any
) -> Run:
    """A run with these seconds, which decided from the scores of ``measured_by``, whose seconds are known or not."""
    if measured_by is not None:
        reused = {"scores_reused": True, "measured_seconds": {"calibrate": 4.0} if known else {}}
        options |= {"method": reused, "details": {"measured_by": str(measured_by)}}
    return make_run(root, seconds=seconds, **options)


def table(runs: list[Run]) -> list[dict[str, str]]:
    (group,) = audit(runs).groups
    return results(repeats(runs), group).to_dict("records")


@pytest.fixture
def pair(tmp_path: Path) -> list[Run]:
    """A run that calibrated, and one at another ratio that did not."""
    first = timed(tmp_path, SECONDS, ratio=0.2)
    return [first, timed(tmp_path, REUSED, first.folder, ratio=0.5)]


def test_every_second_is_counted_once_and_evaluation_apart(tmp_path: Path) -> None:
    run = timed(tmp_path, SECONDS | {"a new phase": 0.125})
    assert costs.calibration(run) == 4.0
    assert costs.pruning(run) == 0.5 + 0.25 + 1.0 + 2.0 + 0.125
    assert costs.to_prune(run) == 4.0 + costs.pruning(run)


def test_reused_scores_are_marked_and_show_what_measuring_them_cost(pair: list[Run]) -> None:
    columns = ("system", "calibrate s", "prune s", "evaluate s")
    assert [tuple(row[name] for name in columns) for row in table(pair)] == [
        ("dense", "", "", "30.0"),
        ("wanda", "4.0", "3.8", "3.0"),
        ("wanda", "4.0 *", "3.8", "3.0"),
    ]
    assert costs.LEGEND_REUSED in terminal(sections(audit(pair), []))
    assert costs.LEGEND_REUSED not in terminal(sections(audit(pair[:1]), []))
    rows = list(csv.DictReader(io.StringIO(results_csv(audit(pair), []))))
    names = ("seconds_calibrate", "scores_measured_by", "seconds_prune", "seconds_evaluate_dense")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("4.0", "", "3.75", "30.0"),
        ("4.0", str(pair[0].folder), "3.75", ""),
    ]


@pytest.mark.parametrize(("no_data", "shown"), [(False, "– *"), (True, "–")])
def test_calibration_that_is_not_known_is_not_free_and_one_that_was_not_needed_is_not_marked(
    tmp_path: Path, no_data: bool, shown: str
) -> None:
    run = timed(tmp_path, REUSED, Path("/gone"), known=False, no_data=no_data)
    assert costs.calibration(run) is None
    assert table([run])[1]["calibrate s"] == shown
