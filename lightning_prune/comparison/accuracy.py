"""Zero-shot accuracy as the tables show it: how it is read, averaged over seeds, and written."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_prune.support.escape import plain

if TYPE_CHECKING:
    from lightning_prune.comparison.audit import Audit
    from lightning_prune.comparison.run import Run

MAIN = "acc"  # the metric of a column; a task without it shows its first one
LEGEND = (
    "acc: right answers of the LM Evaluation Harness without examples, in percent ± its standard error over the "
    "questions; of several seeds the means of both. mean acc is the unweighted mean over the tasks. Other metrics, "
    "in their own unit, stand in zero_shot.csv."
)


@dataclass(frozen=True)
class Score:
    """A metric as the harness gives it, and its standard error; None where there is none."""

    value: float | None
    stderr: float | None


@dataclass(frozen=True)
class Accuracy:
    """Scores by task, then by metric, of a pruned model and of its base model; ``harness`` is a version."""

    pruned: dict[str, dict[str, Score]]
    dense: dict[str, dict[str, Score]]
    harness: str


def columns(runs: "Sequence[Run]") -> list[str]:
    """Headings: one per task, then the mean of the tasks that have an accuracy; [] where nothing was measured."""
    tasks = shown_tasks(runs)
    several = sum(metric == MAIN for metric in tasks.values()) > 1
    return [f"{metric} {task}" for task, metric in tasks.items()] + ([f"mean {MAIN}"] if several else [])


def cells(runs: "Sequence[Run]", among: "Sequence[Run]", dense: bool = False) -> list[str]:
    """What stands below ``columns(among)`` for ``runs``, which differ in their seed only."""
    tasks = shown_tasks(among)
    found, means = [], []
    for task, metric in tasks.items():
        score = mean(runs, task, metric, dense)
        scale = 100 if metric == MAIN else 1
        if score.value is None:
            found.append("–")
            continue
        means += [score.value] if metric == MAIN else []
        error = "" if score.stderr is None else f" ± {scale * score.stderr:.2f}"
        found.append(f"{scale * score.value:.2f}{error}")
    wanted = sum(metric == MAIN for metric in tasks.values())
    if wanted > 1:
        found.append(f"{100 * statistics.fmean(means):.2f}" if len(means) == wanted else "–")
    return found


def mean(runs: "Sequence[Run]", task: str, metric: str, dense: bool = False) -> Score:
    """Means of value and standard error over ``runs``; no value unless all of them have one."""
    results = [run.accuracy.dense if dense else run.accuracy.pruned for run in runs if run.accuracy is not None]
    scores = [result[task][metric] for result in results if metric in result.get(task, {})]
    values = [score.value for score in scores if score.value is not None]
    errors = [score.stderr for score in scores if score.stderr is not None]
    if not values or len(values) < len(runs):
        return Score(None, None)
    return Score(statistics.fmean(values), statistics.fmean(errors) if errors else None)


def csv_text(audit: "Audit") -> str:
    """``zero_shot.csv``: a line per model, task and metric, full precision; the dense model once per table."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("table", "system", "requested_ratio", "task", "metric", "value", "stderr", "harness", "folder"))
    for index, group in enumerate(audit.groups, start=1):
        measured = [(run, run.accuracy) for run in group.all if run.accuracy is not None]
        if measured:
            run, found = measured[0]
            writer.writerows(_lines((index, "dense", 0), found.dense, found.harness, run.base_model))
        for run, found in measured:
            first = (index, plain(run.label), run.requested)
            writer.writerows(_lines(first, found.pruned, found.harness, str(run.folder)))
    return buffer.getvalue()


def _lines(
    first: tuple[object, ...], scores: dict[str, dict[str, Score]], harness: str, where: str
) -> list[tuple[object, ...]]:
    return [
        (*first, plain(task), plain(metric), score.value, score.stderr, harness, plain(where))
        for task, metrics in scores.items()
        for metric, score in metrics.items()
    ]


def shown_tasks(runs: "Sequence[Run]") -> dict[str, str]:
    """The metric shown, by task."""
    found: dict[str, str] = {}
    for run in runs:
        for task, metrics in ({} if run.accuracy is None else run.accuracy.pruned).items():
            if metrics:
                found.setdefault(task, MAIN if MAIN in metrics else next(iter(metrics)))
    return found
