import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.comparison import costs
from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.exports import results_csv
from lightning_prune.comparison.records import Run
from lightning_prune.comparison.repeats import repeats
from lightning_prune.comparison.run import load_run
from lightning_prune.comparison.sections import sections, terminal
from lightning_prune.comparison.tables import results
from tests.comparison.fake_run import write_run

SECONDS = {
    "load": 10.0,
    "tokenise": 20.0,
    "evaluate dense": 30.0,
    "calibrate": 4.0,
    "prune layers": 0.5,
    "decide": 0.25,
    "prune": 1.0,
    "save": 2.0,
    "evaluate pruned": 3.0,
    "total": 80.0,
}


def timed(root: Path, seconds: dict[str, float], measured_by: Path | None = None, **options: Any) -> Path:
    """A run folder with these seconds, which decided from the scores of ``measured_by``."""
    folder = write_run(root, **options)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["seconds"] = seconds
    metrics["method"]["scores_reused"] = measured_by is not None
    metrics["method"]["measured_seconds"] = {} if measured_by is None or options.get("no_data") else {"calibrate": 4.0}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    if measured_by is not None:
        details = json.loads((folder / "method.json").read_text())
        (folder / "method.json").write_text(json.dumps(details | {"measured_by": str(measured_by)}))
    return folder


def without(*phases: str) -> dict[str, float]:
    return {phase: value for phase, value in SECONDS.items() if phase not in phases}


def table(runs: list[Run]) -> list[dict[str, str]]:
    (group,) = audit(runs).groups
    return results(repeats(runs), group).to_dict("records")


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """A run that calibrated, and one at another ratio that did not."""
    first = timed(tmp_path / "root", SECONDS, ratio=0.2)
    return [
        first,
        timed(tmp_path / "root", without("calibrate", "evaluate dense"), first, ratio=0.5, version=1),
    ]


def test_every_second_is_counted_once_and_evaluation_apart(tmp_path: Path) -> None:
    run = load_run(timed(tmp_path, SECONDS | {"a new phase": 0.125}))
    assert costs.calibration(run) == 4.0
    assert costs.pruning(run) == 0.5 + 0.25 + 1.0 + 2.0 + 0.125
    assert costs.to_prune(run) == 4.0 + costs.pruning(run)


def test_dense_evaluation_is_charged_to_the_dense_model(pair: list[Path]) -> None:
    dense, first, second = table([load_run(folder) for folder in pair])
    assert (dense["system"], dense["evaluate s"], dense["calibrate s"]) == ("dense", "30.0", "")
    assert (first["calibrate s"], first["prune s"], first["evaluate s"]) == ("4.0", "3.8", "3.0")
    assert (second["prune s"], second["evaluate s"]) == ("3.8", "3.0")


def test_reused_scores_are_marked_and_show_what_measuring_them_cost(pair: list[Path]) -> None:
    runs = [load_run(folder) for folder in pair]
    assert [row["calibrate s"] for row in table(runs)[1:]] == ["4.0", "4.0 *"]
    assert costs.LEGEND_REUSED in terminal(sections(audit(runs), []))
    assert costs.LEGEND_REUSED not in terminal(sections(audit(runs[:1]), []))
    found = list(csv.DictReader(io.StringIO(results_csv(audit(runs), []))))
    assert [row["seconds_calibrate"] for row in found] == ["4.0", "4.0"]
    assert [row["scores_measured_by"] for row in found] == ["", str(pair[0])]
    assert [row["seconds_prune"] for row in found] == ["3.75", "3.75"]
    assert [row["seconds_evaluate_dense"] for row in found] == ["30.0", ""]


def test_calibration_that_was_not_recorded_is_unknown_and_not_free(pair: list[Path]) -> None:
    metrics = json.loads((pair[1] / "metrics.json").read_text())
    del metrics["method"]["measured_seconds"]
    (pair[1] / "metrics.json").write_text(json.dumps(metrics))
    assert costs.calibration(load_run(pair[1])) is None
    assert table([load_run(pair[1])])[1]["calibrate s"] == "– *"


def test_method_without_data_has_no_calibration_to_mark(tmp_path: Path) -> None:
    folder = timed(tmp_path, without("calibrate"), Path("/gone"), no_data=True)
    assert table([load_run(folder)])[1]["calibrate s"] == "–"
