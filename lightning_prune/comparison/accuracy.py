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
    """The metric of every task that some run measured."""
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
    """Cells of one line by column: one per task of ``among`` (all runs of the table), then the mean of the tasks that
    have an accuracy. ``runs`` differ in their seed only; ``dense`` is of their base model instead."""
    row: dict[str, str] = {}
    accuracies: list[float | None] = []
    for task, metric in shown_tasks(among).items():
        score, scale = mean(runs, task, metric, dense), 100 if metric == MAIN else 1
        error = "" if score.stderr is None else f" ± {scale * score.stderr:.2f}"
        row[f"{metric} {task}"] = "–" if score.value is None else f"{scale * score.value:.2f}{error}"
        accuracies += [score.value] if metric == MAIN else []
    if len(accuracies) > 1:
        known = [value for value in accuracies if value is not None]
        row[f"mean {MAIN}"] = f"{100 * statistics.fmean(known):.2f}" if len(known) == len(accuracies) else "–"
    return row
