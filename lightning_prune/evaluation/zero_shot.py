"""Zero-shot tasks through the LM Evaluation Harness, an optional dependency."""

import importlib.util
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from lightning_prune.data.tokenization import window_start
from lightning_prune.support.errors import UserError, first_line
from lightning_prune.support.escape import plain

# Shares of right answers. Other metrics (perplexity, brier_score, bleu, …) are not shares, or come in percent already.
SHARES = re.compile(
    r"(acc|acc_\w+|\w+_acc|accuracy|exact|exact_match|em|f1|micro_f1|macro_f1|precision|recall|mc1|mc2|pass@\d+)"
    r"(,.*)?"  # a filter of the harness
)


@dataclass(frozen=True)
class Metric:
    """A value as the harness gives it, and its standard error (None where there is none)."""

    value: float
    stderr: float | None

    def shown(self, percent: bool) -> str:
        """Text of the value ± standard error, in percent or as it is."""
        scale, digits = (100, 2) if percent else (1, 3)
        error = "" if self.stderr is None else f" ± {scale * self.stderr:.{digits}f}"
        return f"{scale * self.value:.{digits}f}{error}"


@dataclass(frozen=True)
class ZeroShotResult:
    """Metrics by task, then by name (``acc``, ``acc_norm``), and the harness's version."""

    tasks: dict[str, dict[str, Metric]]
    harness: str

    @property
    def mean(self) -> dict[str, float]:
        """Means over the tasks with accuracy: ``acc``, and ``acc_norm`` with ``acc`` for tasks without it. Papers print
        one or the other."""
        rows = [metrics for metrics in self.tasks.values() if "acc" in metrics]
        if not rows:
            return {}
        return {
            "acc": sum(row["acc"].value for row in rows) / len(rows),
            "acc_norm": sum(row.get("acc_norm", row["acc"]).value for row in rows) / len(rows),
        }

    def to_json(self) -> dict[str, Any]:
        """The result as it is in ``zero_shot.json``."""
        return {"harness": self.harness, "mean": self.mean, **asdict(self)}


def check_tasks(tasks: Sequence[str], include_path: Path | None = None) -> Any:
    """The harness's task manager, after the data of every task or group has been opened once; ``include_path`` is a
    folder with further tasks as YAML files.

    Raises:
        UserError: the harness is not installed, a task is unknown, or its data cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--zero-shot needs the package lm-eval. Install it in the clone: pip install '.[eval]'")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager, get_task_dict

    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path: no folder at '{include_path}'. Give the folder that holds the task's YAML.")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # the manager sets its own level
    known = set(manager.all_tasks) - set(manager.all_tags)
    for name in tasks:
        if name not in known:
            raise UserError(
                f"--tasks: '{name}' is not a task or group of the LM Evaluation Harness. 'lm-eval ls tasks' lists "
                "them; --include-path adds a folder of your own."
            )
        try:
            get_task_dict([name], manager)
        except Exception as error:  # datasets, huggingface_hub, requests and task code raise what they like
            raise UserError(
                f"--tasks: the data of '{name}' cannot be loaded ({type(error).__name__}: {first_line(error)}). "
                "Connect to the network once so that it is downloaded, or leave the task out of --tasks."
            ) from error
    return manager


def zero_shot(
    model: PreTrainedModel, tokenizer: Any, tasks: Sequence[str], manager: Any, batch_size: int = 16
) -> ZeroShotResult:
    """Evaluate a causal LM on its device and in its dtype, without examples in the prompt, on ``tasks`` that
    ``check_tasks``, which returned ``manager``, has checked. Texts begin as the tokenizer begins them by itself."""
    from lm_eval import __version__ as harness
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    language_model = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        device=str(model.device),
        add_bos_token=window_start(tokenizer) is not None,
    )
    options = {"task_manager": manager, "num_fewshot": 0, "log_samples": False}
    results = simple_evaluate(model=language_model, tasks=list(tasks), **options)["results"]
    return ZeroShotResult({name: _metrics(results[name]) for name in tasks}, harness)


def _metrics(row: dict[str, Any]) -> dict[str, Metric]:
    """The harness's ``{"acc,none": 0.5, "acc_stderr,none": 0.1}`` by metric; a filter's name is kept, except none."""
    metrics = {}
    for key, value in row.items():
        name, _, kind = key.partition(",")
        if kind and not name.endswith("_stderr") and isinstance(value, float | int):
            stderr = row.get(f"{name}_stderr,{kind}")
            label = name if kind == "none" else key
            metrics[label] = Metric(float(value), float(stderr) if isinstance(stderr, float | int) else None)
    return metrics


def table(results: dict[str, ZeroShotResult]) -> str:
    """One line per task and metric, one column per model, then the means. Values ± standard error."""
    columns = list(results)
    lines = [["task", "metric", *columns]]
    first = next(iter(results.values()))
    for task, metrics in first.tasks.items():
        for metric in metrics:
            values = [result.tasks[task][metric] for result in results.values()]
            # Some tasks (SQuAD) report their shares in percent themselves.
            share = SHARES.fullmatch(metric) is not None and all(abs(value.value) <= 1 for value in values)
            lines.append([plain(task), plain(metric), *(value.shown(percent=share) for value in values)])
    for metric in first.mean:
        lines.append(["mean", metric, *(f"{100 * result.mean[metric]:.2f}" for result in results.values())])
    legend = "Shares (acc, exact_match, f1, …) in percent, other metrics in their own unit."
    return f"{tabulate(lines, tablefmt='plain', disable_numparse=True)}\n{legend}"
