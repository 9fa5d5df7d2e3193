import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.comparison import costs
from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.plots import seconds_figure
from lightning_prune.comparison.run import Run, load_run
from lightning_prune.comparison.sections import sections, terminal
from lightning_prune.comparison.tables import csv_text, header, rows
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
    (folder / "metrics.json").write_text(json.dumps(metrics))
    if measured_by is not None:
        details = json.loads((folder / "method.json").read_text())
        (folder / "method.json").write_text(json.dumps(details | {"measured_by": str(measured_by)}))
    return folder


def without(*phases: str) -> dict[str, float]:
    return {phase: value for phase, value in SECONDS.items() if phase not in phases}


def table(runs: list[Run]) -> list[dict[str, str]]:
    return [dict(zip(header(["demo"]), row, strict=True)) for row in rows(runs, ["demo"], runs)]


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
    assert costs.spent(run, costs.EVALUATE) == 3.0
    assert costs.spent(run, ("nothing",)) is None


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
    found = list(csv.DictReader(io.StringIO(csv_text(audit(runs), []))))
    assert [row["seconds_calibrate"] for row in found] == ["4.0", "4.0"]
    assert [row["scores_measured_by"] for row in found] == ["", str(pair[0])]
    assert [row["seconds_prune"] for row in found] == ["3.75", "3.75"]
    assert [row["seconds_evaluate_dense"] for row in found] == ["30.0", ""]


def test_moved_runs_find_each_other(pair: list[Path], tmp_path: Path) -> None:
    shutil.move(tmp_path / "root", tmp_path / "elsewhere")
    moved = load_run(tmp_path / "elsewhere" / pair[1].relative_to(tmp_path / "root"))
    assert costs.calibration(moved) == 4.0


def test_calibration_of_a_run_that_is_gone_or_another_is_unknown_and_not_free(pair: list[Path], tmp_path: Path) -> None:
    shutil.rmtree(pair[0])
    assert costs.calibration(load_run(pair[1])) is None
    assert table([load_run(pair[1])])[1]["calibrate s"] == "– *"
    # Something else took its place: other tokens, so another calibration.
    timed(tmp_path / "root", SECONDS, ratio=0.2, calibration={"fingerprint": "9" * 64})
    assert costs.calibration(load_run(pair[1])) is None


def test_recorded_seconds_of_the_measurement_need_no_folder(pair: list[Path]) -> None:
    shutil.rmtree(pair[0])
    metrics = json.loads((pair[1] / "metrics.json").read_text())
    metrics["method"]["measured_seconds"] = {"calibrate": 7.0}
    (pair[1] / "metrics.json").write_text(json.dumps(metrics))
    assert table([load_run(pair[1])])[1]["calibrate s"] == "7.0 *"


def test_method_without_data_has_no_calibration_to_mark(tmp_path: Path) -> None:
    folder = timed(tmp_path, without("calibrate"), Path("/gone"), no_data=True)
    assert table([load_run(folder)])[1]["calibrate s"] == "–"


def test_bars_leave_out_what_is_no_cost_of_the_method(pair: list[Path]) -> None:
    axes = seconds_figure([load_run(folder) for folder in pair]).axes[0]
    ends = {round(bar.get_x() + bar.get_width(), 6) for bar in axes.patches}
    assert max(ends) == 4.0 + 3.75 + 3.0
    hatched = [bar.get_width() for bar in axes.patches if bar.get_hatch()]
    assert hatched == [0.0, 4.0]  # the second run did not wait for its calibration
