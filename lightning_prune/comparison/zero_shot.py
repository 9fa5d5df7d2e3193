"""Zero-shot accuracy of runs and their base models, measured once per checkpoint and task and kept below the root."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_prune import __version__
from lightning_prune.comparison.records import Accuracy, Run, Score
from lightning_prune.evaluation.zero_shot import check_tasks, zero_shot
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.model_slot import DTYPES
from lightning_prune.runs.folder import REPORTS
from lightning_prune.support.devices import CPU, accelerator
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import writable, write_json
from lightning_prune.support.validation import read_json

OPTION = "--zero-shot"
BATCH = 16  # sequences per forward pass
Scores = dict[str, Score]  # by metric


@dataclass
class ZeroShot:
    """Measures what is not kept yet.

    A kept value is in ``<root>/comparison/zero_shot/<task and versions>/<checkpoint, dtype and device>.json``. The
    first is a hash of the task's name, the versions of the harness, of transformers and of this package, and every file
    below ``include_path``; data that a task reads from elsewhere is taken to stay as it is.
    """

    tasks: Sequence[str]
    include_path: Path | None
    root: Path
    verbose: bool = True

    def check(self) -> None:
        """Open the tasks, before hours are spent on runs; a task of which something is kept was there before."""
        if not all(self._place(task).is_dir() for task in self.tasks):
            _ = self._manager

    def measure(self, runs: Sequence[Run]) -> list[Run]:
        """``runs`` with their accuracy and that of their base models."""
        opened, measured = cache(Checkpoint.open), []
        for run in runs:
            method, precision, folder = run.metrics.method, run.environment.precision, run.folder / "pruned"
            if not folder.is_dir():
                raise UserError(f"{OPTION}: '{folder}' no longer exists. Make the run again, or leave it out.")
            base = opened(method.base_model)
            if method.base_model_sha256 not in (None, base.fingerprint):
                raise UserError(
                    f"{OPTION}: '{method.base_model}' has changed since '{run.folder}' pruned it. Restore "
                    "it, or prune again."
                )
            dense = self._scores(base, precision, "")
            # Of large files the fingerprint reads samples, in which two prunings of one model need not differ.
            plan = hashlib.sha256((run.folder / "plan.json").read_bytes()).hexdigest()
            pruned = self._scores(opened(str(folder)), precision, f"{plan} {run.metrics.configuration_sha256}")
            measured.append(replace(run, accuracy=Accuracy(pruned, dense, _version("lm_eval"))))
        return measured

    def _scores(self, model: Checkpoint, precision: str, made: str) -> dict[str, Scores]:
        """Scores of one model by task; ``made`` says how the checkpoint was made."""
        device = accelerator() or CPU
        key = _hash([model.fingerprint, made, precision, device.type, "bos as the tokenizer puts it"])
        files = {task: self._place(task) / f"{key}.json" for task in self.tasks}
        missing = [task for task, file in files.items() if not file.is_file()]
        if missing:
            manager = self._manager
            if model.tokenizer is None:
                raise UserError(
                    f"{OPTION}: '{model.pretrained}' holds no tokenizer. Save the model's tokenizer files there."
                )
            if self.verbose:
                print(f"zero-shot: {', '.join(missing)} with '{model.pretrained}'")
            loaded: Any = model.load(DTYPES[precision])
            results = zero_shot(loaded.to(device), model.tokenizer, missing, manager, BATCH)
            for task, metrics in results.tasks.items():
                with writable(files[task].parent, "--root"):
                    files[task].parent.mkdir(parents=True, exist_ok=True)
                    write_json(files[task], {name: asdict(metric) for name, metric in metrics.items()})
        hint = "Remove it, so that it is measured again."
        return {task: read_json(file, dict[str, Score], OPTION, hint) for task, file in files.items()}

    @cached_property
    def _manager(self) -> Any:
        try:
            return check_tasks(self.tasks, self.include_path)
        except UserError as error:
            raise UserError(str(error).replace("--tasks", OPTION)) from error

    def _place(self, task: str) -> Path:
        content = []
        if self.include_path is not None:
            for path in sorted(path for path in self.include_path.rglob("*") if path.is_file()):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                content.append((str(path.relative_to(self.include_path)), digest))
        made = _hash([task, _version("lm_eval"), _version("transformers"), __version__, content])
        return self.root / REPORTS / "zero_shot" / made


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
