"""How a run's seconds divide into calibrating, pruning and evaluating."""

from lightning_prune.comparison.records import Run

CALIBRATE, EVALUATE = "calibrate", "evaluate pruned"
EVALUATE_DENSE = "evaluate dense"  # once for all runs of an experiment, by whichever run comes first
# Work that is the same for every method. What is neither this nor calibrating is the price of the decision and the cut.
COMMON = ("load", "tokenise", "check", EVALUATE, EVALUATE_DENSE, "total")
LEGEND = (
    "Seconds: calibrate is the passes over the calibration set; prune is deciding, cutting and saving; evaluate is the "
    "perplexity of that line's model. Loading and tokenising are the same for all and are in results.csv."
)
LEGEND_REUSED = (
    "Seconds with *: the run reused the scores of an earlier one; this is what that one's calibration took (– where it "
    "was not recorded)."
)


def calibration(run: Run) -> float | None:
    """Seconds of the calibration that a run's decision needed, in whichever run it took place; None where that is not
    known, or nothing was calibrated."""
    method = run.metrics.method
    seconds = method.measured_seconds if method.scores_reused else run.metrics.seconds
    return seconds.get(CALIBRATE)


def pruning(run: Run) -> float | None:
    """Seconds of deciding, solving, cutting and saving: everything but calibration and what all methods share."""
    # The seconds of training are in a table of their own.
    seconds = run.metrics.seconds if run.recovery is None else run.metrics.method.measured_seconds
    spent = [value for phase, value in seconds.items() if phase not in (CALIBRATE, *COMMON)]
    return sum(spent) if spent else None


def to_prune(run: Run) -> float | None:
    """Seconds of calibrating and pruning, a reused calibration in full; None where that one's are not known."""
    calibrated = calibration(run)
    if calibrated is None and run.calibration is not None:
        return None
    return (calibrated or 0.0) + (pruning(run) or 0.0)


def reused(run: Run) -> bool:
    """Whether the run decided from another run's scores, so that its own seconds lack the calibration."""
    return run.metrics.method.scores_reused and run.calibration is not None
