"""What a run's seconds were spent on: calibrating, pruning, or evaluating."""

from collections.abc import Sequence
from pathlib import Path

from lightning_prune.comparison.run import Run, load_run
from lightning_prune.support.errors import UserError

CALIBRATE = ("calibrate",)
EVALUATE = ("evaluate pruned",)
EVALUATE_DENSE = ("evaluate dense",)  # once for all runs of an experiment, by whichever run comes first
# Work that is the same for every method. What is neither this nor calibrating is the price of the decision and the cut.
COMMON = ("load", "tokenise", "check", *EVALUATE, *EVALUATE_DENSE, "total")
REUSED = "*"
LEGEND = (
    "Seconds: calibrate is the passes over the calibration set; prune is deciding, cutting and saving; evaluate is the "
    "perplexity of that line's model. Loading and tokenising are the same for all and stand in results.csv."
)
LEGEND_REUSED = (
    f"Seconds with {REUSED}: the run reused the scores of an earlier one; this is what that one's calibration took "
    "(– where its folder is gone)."
)


def spent(run: Run, phases: Sequence[str]) -> float | None:
    """Seconds of a run in ``phases``; None where it had none of them."""
    found = [run.seconds[phase] for phase in phases if phase in run.seconds]
    return sum(found) if found else None


def pruning(run: Run) -> float | None:
    """Seconds of deciding, solving, cutting and saving: everything but calibration and what all methods share."""
    seconds = run.seconds if run.recovery is None else run.measured_seconds  # training stands in a table of its own
    found = [seconds[phase] for phase in seconds if phase not in (*CALIBRATE, *COMMON)]
    return sum(found) if found else None


def calibration(run: Run) -> float | None:
    """Seconds of the calibration behind a run's decision, wherever it took place; None where that is not known, or
    nothing was calibrated."""
    if not run.reused_scores:
        return spent(run, CALIBRATE)
    if CALIBRATE[0] in run.measured_seconds:
        return run.measured_seconds[CALIBRATE[0]]
    source = _measuring_run(run)
    return None if source is None else spent(source, CALIBRATE)


def text(value: float | None, mark: str = "") -> str:
    """Seconds as a table's cell."""
    return ("–" if value is None else f"{value:.1f}") + mark


def mark(run: Run) -> str:
    """What stands behind the seconds of a calibration whose scores were reused, so that nothing looks free."""
    return f" {REUSED}" if run.reused_scores and run.calibration is not None else ""


def legend(runs: Sequence[Run]) -> list[str]:
    """What the columns of seconds mean."""
    reused = any(run.reused_scores and run.calibration is not None for run in runs)
    return [LEGEND, LEGEND_REUSED] if reused else [LEGEND]


def _measuring_run(run: Run) -> Run | None:
    """The run whose scores were reused: where it was recorded, or beside this run after both have moved."""
    if run.measured_by is None:
        return None
    recorded = Path(run.measured_by)
    for folder in (recorded, run.folder.parent / recorded.name, run.folder.parent.parent / Path(*recorded.parts[-2:])):
        try:
            found = load_run(folder)
        except (UserError, OSError, ValueError):
            continue
        same = (found.method, found.base_model_sha256) == (run.method, run.base_model_sha256)
        if same and not found.reused_scores and found.calibration == run.calibration:
            return found
    return None
