"""Zero-shot accuracy of runs and their base models, measured once per checkpoint and task and kept below the root."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_prune import __version__
from lightning_prune.comparison.accuracy import Accuracy, Score
from lightning_prune.comparison.run import Run
from lightning_prune.runs.folder import REPORTS
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import writable, write_json
from lightning_prune.support.validation import read_json

FOLDER = "zero_shot"
BATCH = 16  # sequences per forward pass
OPTION = "--zero-shot"


@dataclass(frozen=True)
class _Model:
    """A checkpoint in a precision of the trainer. ``made`` says how: of large files the fingerprint reads samples, in
    which two prunings of one model need not differ."""

    path: str
    precision: str
    made: str = ""


@dataclass
class ZeroShot:
    """Measures what is not kept yet.

    A kept value lies in ``<root>/comparison/zero_shot/<task and versions>/<checkpoint, dtype and device>.json``. The
    first is a hash of the task's name, the versions of the harness, of transformers and of this package, and every file
    below ``include_path``; data that a task reads from elsewhere is taken to stay as it is.
    """

    tasks: Sequence[str]
    include_path: Path | None
    root: Path
    _manager: Any = field(default=None, init=False)
    _fingerprints: dict[str, str | None] = field(default_factory=dict, init=False)
    _unkept: dict[tuple[str, _Model], dict[str, Score]] = field(default_factory=dict, init=False)

    def check(self) -> None:
        """Open the tasks, before hours are spent on runs; a task of which something is kept was there before.

        Raises:
            UserError: the harness is missing, a task is unknown, or its data cannot be had.
        """
        if not all(self._place(task).is_dir() for task in self.tasks):
            self._open()

    def measure(self, runs: Sequence[Run]) -> list[Run]:
        """``runs`` with their accuracy and that of their base models.

        Raises:
            UserError: a run without its checkpoint or tokenizer, a base model that has changed, or as ``check``.
        """
        found = []
        for run in runs:
            folder = run.folder / "pruned"
            if not folder.is_dir():
                raise UserError(f"{OPTION}: '{folder}' is gone. Make the run again, or leave it out.")
            base, now = run.base_model_sha256, self._fingerprint(run.base_model)
            if base is not None and now != base:
                raise UserError(
                    f"{OPTION}: '{run.base_model}' is not the model any more that '{run.folder}' pruned. Put that one "
                    "back, or prune again."
                )
            precision = str(run.environment.get("precision"))
            dense = self._scores(_Model(run.base_model, precision))
            plan = hashlib.sha256((run.folder / "plan.json").read_bytes()).hexdigest()
            made = f"{plan} {run.metrics.get('configuration_sha256')}"
            accuracy = Accuracy(self._scores(_Model(str(folder), precision, made)), dense, _version("lm_eval"))
            found.append(replace(run, accuracy=accuracy))
        return found

    def _scores(self, model: _Model) -> dict[str, dict[str, Score]]:
        known = {task: self._kept(task, model) for task in self.tasks}
        missing = [task for task, scores in known.items() if scores is None]
        for task, scores in self._evaluate(model, missing) if missing else ():
            known[task] = scores
            self._keep(task, model, scores)
        return {task: scores for task, scores in known.items() if scores is not None}

    def _evaluate(self, model: _Model, tasks: list[str]) -> Iterable[tuple[str, dict[str, Score]]]:
        from lightning_prune.calibration.module import DTYPES
        from lightning_prune.evaluation.zero_shot import zero_shot
        from lightning_prune.models.checkpoint import Checkpoint

        self._open()
        checkpoint = Checkpoint.open(model.path)
        tokenizer = checkpoint.tokenizer
        if tokenizer is None:
            raise UserError(f"{OPTION}: '{model.path}' holds no tokenizer. Save the model's tokenizer files there.")
        print(f"zero-shot: {', '.join(tasks)} with '{model.path}'")
        loaded: Any = checkpoint.load(DTYPES[model.precision])
        found = zero_shot(loaded.to(_device()), tokenizer, tasks, self._manager, BATCH)
        for task, metrics in found.tasks.items():
            yield task, {name: Score(metric.value, metric.stderr) for name, metric in metrics.items()}

    def _open(self) -> None:
        from lightning_prune.evaluation.zero_shot import check_tasks

        if self._manager is None:
            try:
                self._manager = check_tasks(self.tasks, self.include_path)
            except UserError as error:
                raise UserError(str(error).replace("--tasks", OPTION)) from error

    def _kept(self, task: str, model: _Model) -> dict[str, Score] | None:
        path = self._file(task, model)
        if path is None:
            return self._unkept.get((task, model))
        if not path.is_file():
            return None
        return read_json(path, dict[str, Score], OPTION, "Remove it, so that it is measured again.")

    def _keep(self, task: str, model: _Model, scores: dict[str, Score]) -> None:
        path = self._file(task, model)
        if path is None:
            self._unkept[task, model] = scores
            return
        with writable(path.parent, "--root"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {name: {"value": one.value, "stderr": one.stderr} for name, one in scores.items()})

    def _file(self, task: str, model: _Model) -> Path | None:
        """Where a value is kept; None where the checkpoint has no fingerprint."""
        fingerprint = self._fingerprint(model.path)
        if fingerprint is None:
            return None
        return self._place(task) / f"{_hash([fingerprint, model.made, model.precision, _device()])}.json"

    def _place(self, task: str) -> Path:
        facts = [task, _version("lm_eval"), _version("transformers"), __version__, _content(self.include_path)]
        return self.root / REPORTS / FOLDER / _hash(facts)

    def _fingerprint(self, model: str) -> str | None:
        from lightning_prune.models.checkpoint import Checkpoint

        if model not in self._fingerprints:
            self._fingerprints[model] = Checkpoint.open(model).fingerprint
        return self._fingerprints[model]


def _content(folder: Path | None) -> list[tuple[str, str]]:
    """Names and hashes of all files below a folder."""
    if folder is None:
        return []
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
