"""Zero-shot accuracy: averaged over seeds, and as table cells."""

import statistics
from collections.abc import Sequence

from lightning_prune.comparison.records import Run, Score

MAIN = "acc"  # the metric of a column; a task without it shows its first one
LEGEND = (
    "acc: right answers of the LM Evaluation Harness without examples, in percent ± its standard error over the "
    "questions; with several seeds the means of both. mean acc is the unweighted mean over the tasks. Other metrics, "
    "in their own unit, are in zero_shot.csv."
)


def shown_tasks(runs: Sequence[Run]) -> dict[str, str]:
    """The metric shown, by task."""
    shown: dict[str, str] = {}
    for run in runs:
        for task, metrics in ({} if run.accuracy is None else run.accuracy.pruned).items():
            if metrics:
                shown.setdefault(task, MAIN if MAIN in metrics else next(iter(metrics)))
    return shown


def mean(runs: Sequence[Run], task: str, metric: str, dense: bool = False) -> Score:
    """Means of value and standard error over ``runs``; no value unless all of them have one."""
    results = [run.accuracy.dense if dense else run.accuracy.pruned for run in runs if run.accuracy is not None]
    scores = [result[task][metric] for result in results if metric in result.get(task, {})]
    values = [score.value for score in scores if score.value is not None]
    errors = [score.stderr for score in scores if score.stderr is not None]
    if not values or len(values) < len(runs):
        return Score(None, None)
    return Score(statistics.fmean(values), statistics.fmean(errors) if errors else None)


def cells(runs: Sequence[Run], among: Sequence[Run], dense: bool = False) -> dict[str, str]:
    """Cells of one line by column: one per task of ``among``, then the mean of the tasks that have an accuracy.

    Args:
        runs: runs that differ in their seed only.
        among: all runs of the table.
        dense: of the base model instead.
    """
    tasks = shown_tasks(among)
    row: dict[str, str] = {}
    accuracies: list[float] = []
    for task, metric in tasks.items():
        score = mean(runs, task, metric, dense)
        scale = 100 if metric == MAIN else 1
        if score.value is None:
            row[f"{metric} {task}"] = "–"
            continue
        if metric == MAIN:
            accuracies.append(score.value)
        error = "" if score.stderr is None else f" ± {scale * score.stderr:.2f}"
        row[f"{metric} {task}"] = f"{scale * score.value:.2f}{error}"
    wanted = sum(metric == MAIN for metric in tasks.values())
    if wanted > 1:
        row[f"mean {MAIN}"] = f"{100 * statistics.fmean(accuracies):.2f}" if len(accuracies) == wanted else "–"
    return row
