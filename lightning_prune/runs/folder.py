"""The run folder: claimed by one process, written file by whole file, read back as types. Nothing else touches it.

``<root>/<label>/version_N/`` belongs to whoever made it with ``mkdir``. While its run is under way it holds a file
``unfinished``, which the process holds with ``flock``; the file is gone when the run is finished. A folder whose
``unfinished`` nobody holds is that of a run that was killed or failed.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.checkpoint.scores import Scores
from lightning_prune.runs.records import (
    Calibration,
    Environment,
    EvaluationMetrics,
    MethodDetails,
    NoCalibration,
    Recovered,
    RunMetrics,
)
from lightning_prune.runs.tidy import (
    METRICS,
    STARTED,
    UNFINISHED,
    forget_findings,
    is_finished,
    leftovers,
    runs_below,
    sweep_runs,
    version,
)
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import (
    Lock,
    cannot_write,
    finite,
    nearest_existing,
    read_file,
    remove_empty_parents,
    sweep,
    writable,
    write_json,
    write_text,
)
from lightning_prune.support.names import FINDINGS, PRUNED, TRAINING
from lightning_prune.support.validation import parse_json, read_json

ROOT_OPTION = "--trainer.default_root_dir"
RECOVERY = "recovery.json"
REPORTS = "comparison"  # the name under which ``compare`` leaves reports below a root
REQUIRED = (METRICS, "config.yaml", "scores.csv", "plan.json", "method.json", "calibration.json", "environment.json")
LABEL = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
CONFIG_LIMIT = 16 * 2**20  # bytes


def check_label(label: str, option: str = "--model.label") -> str:
    """``label`` if it may name a folder.

    Raises:
        UserError: anything but letters, digits, ``.``, ``_`` and ``-``, a leading ``.``, or more than 200 characters.
    """
    if not isinstance(label, str) or not LABEL.fullmatch(label):
        raise UserError(
            f"{option}: found {str(label)[:200]!r}; a name consists of up to 200 letters, digits, '.', '_' and '-' and "
            "does not start with '.', because a folder is called so."
        )
    return label


@dataclass(frozen=True)
class FinishedRun:
    """The typed records of a finished pruning run."""

    path: Path
    metrics: RunMetrics
    environment: Environment
    details: MethodDetails
    calibration: Calibration | None
    plan: PruningPlan
    option: str
    recovery: Recovered | None = None  # where it trained what another run had pruned

    @cached_property
    def scores(self) -> Scores:
        """``scores.csv``, complete and in agreement with the plan.

        Raises:
            UserError: it is neither.
        """
        path = self.path / "scores.csv"
        scores = Scores.read(path, self.option)
        try:
            scores.check_plan(self.plan)
        except ValueError as error:
            raise UserError(f"{self.option}: '{path}' does not belong to its plan ({error}).") from None
        return scores


class RunFolder:
    """One run folder, by its path. ``claim`` gives one to write, ``open`` the records of a finished one."""

    def __init__(self, path: Path, option: str = ROOT_OPTION, lock: Lock | None = None) -> None:
        self.path = path
        self.option = option
        self._lock = lock  # on ``unfinished``, while this process makes the run

    # Claiming

    @classmethod
    @contextmanager
    def claim(
        cls, root: Path, label: str, option: str = ROOT_OPTION, again: Path | None = None
    ) -> Iterator["RunFolder"]:
        """The next ``<root>/<label>/version_N``, for this process alone, or the unfinished run ``again``.

        At the end of the block the folder is a finished run. If the block raises, the folder is removed unless it holds
        something worth keeping; then it stays marked ``unfinished``, and the exception carries a note that says so.

        Raises:
            UserError: a label that is no name, nothing can be written there, or the run to take up lives.
        """
        check_label(label)
        parent = Path(root) / label
        there_before, folder = Path(), None
        try:
            there_before = nearest_existing(parent)
            folder = cls._next(parent, option) if again is None else cls._again(again, option)
            with writable(Path(root), option):
                yield folder
        except BaseException as error:
            if folder is not None:
                folder._close_after(error, there_before)
            elif isinstance(error, (OSError, ValueError)):
                remove_empty_parents(parent / "x", there_before)
                raise cannot_write(Path(root), option, error) from error
            raise
        folder._finish()
        sweep_runs(parent)

    @classmethod
    def _again(cls, path: Path, option: str) -> "RunFolder":
        lock = Lock.take(path / UNFINISHED)
        if lock is None:
            raise UserError(f"--resume: the run in '{path}' is still under way. Wait for it, or leave --resume out.")
        return cls(path, option, lock)

    @classmethod
    def _next(cls, parent: Path, option: str) -> "RunFolder":
        """The next number. Others claim and tidy at the same time: whoever made the folder and finds nothing but its
        own mark in it has it, everybody else tries again."""
        while True:
            parent.mkdir(parents=True, exist_ok=True)
            sweep(parent.parent)
            sweep_runs(parent)
            with suppress(FileExistsError, FileNotFoundError):
                path = parent / f"version_{1 + max(map(version, os.listdir(parent)), default=-1)}"
                path.mkdir()
                lock = None
                try:
                    lock = Lock.take(path / UNFINISHED, create=True, own=True)
                    if lock is not None and os.listdir(path) == [UNFINISHED]:
                        lock.write(json.dumps({"process": os.getpid(), "host": os.uname().nodename}) + "\n")
                        return cls(path, option, lock)
                    # Swept as empty before it was marked, and then made by somebody else.
                    if lock is not None:
                        lock.remove()
                except BaseException:
                    with suppress(OSError):
                        if lock is not None:
                            lock.remove()
                        path.rmdir()
                    raise

    def _finish(self) -> None:
        forget_findings(self.path)
        if self._lock is not None:
            self._lock.remove()

    def _close_after(self, error: BaseException, there_before: Path) -> None:
        """Keep what may be of use, and say so in a note on ``error``; else remove the folder."""
        if not self.path.is_dir():
            return
        # The same run would end the same way: numbers that overflow, options that cannot be met. A full disk can be
        # emptied.
        mistake = isinstance(error, UserError) and not isinstance(error.__cause__, OSError)
        if mistake or isinstance(error, FloatingPointError):
            forget_findings(self.path)
        useful = self.is_finished or leftovers(self.path)
        if useful:
            kept = ", ".join(sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")))
            state = "is finished" if self.is_finished else "is not finished"
            error.add_note(f"'{self.path}' stays and {state}; it holds {kept}")
        else:
            shutil.rmtree(self.path, ignore_errors=True)
            remove_empty_parents(self.path, there_before)
        if self.is_finished:
            self._finish()
        elif useful and (command := self._resuming()) is not None:
            error.add_note(f"'lightning-prune {command} --config {self.path}/config.yaml --resume' goes on from there")
        if self._lock is not None:
            self._lock.release()

    def _resuming(self) -> str | None:
        """The command whose ``--resume`` can take this unfinished run up."""
        commands = {TRAINING: "recover", FINDINGS: "fit"} if (self.path / STARTED).is_file() else {}
        return next((command for name, command in commands.items() if (self.path / name).is_dir()), None)

    # State

    @property
    def pruned(self) -> Path:
        """The checkpoint's folder."""
        return self.path / PRUNED

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end: ``metrics.json`` is written last."""
        return is_finished(self.path)

    @property
    def is_pruning_run(self) -> bool:
        """Whether this is a finished run of a method, and whole."""
        return all((self.path / name).is_file() for name in REQUIRED)

    # Writing

    def write_config(self, text: str) -> None:
        """``config.yaml``, the resolved configuration; what a run was told is on disk before it begins."""
        write_text(self.path / "config.yaml", text)

    def write_decision(self, scores: Scores, plan: PruningPlan, details: dict[str, Any]) -> None:
        """``scores.csv``, ``plan.json`` and ``method.json``."""
        scores.write(self.path / "scores.csv")
        plan.save(self.path / "plan.json")
        self._write_json("method.json", details, MethodDetails)

    def write_step(self, plan: PruningPlan, write: Callable[[Path], None]) -> None:
        """``steps/<ratio>/``: ``plan.json``, and ``pruned/``, which ``write`` makes."""
        place = self.path / "steps" / f"{plan.pruning_ratio:.4g}"
        place.mkdir(parents=True, exist_ok=True)
        write(place / PRUNED)
        plan.save(place / "plan.json")

    def write_recovery(self, facts: dict[str, Any]) -> None:
        """``recovery.json``."""
        self._write_json(RECOVERY, facts, Recovered)

    def write_results(self, calibration: dict[str, Any], environment: dict[str, Any], metrics: dict[str, Any]) -> None:
        """The records of a pruning run; ``metrics.json`` comes last and means a finished run."""
        kind = NoCalibration if calibration["dataset"] is None else Calibration
        self._write_json("calibration.json", calibration, kind)
        self._write_json("environment.json", environment, Environment)
        self._write_json(METRICS, metrics, RunMetrics)

    def write_evaluation(self, environment: dict[str, Any], metrics: dict[str, Any]) -> None:
        """The records of an evaluation (``test``)."""
        self._write_json("environment.json", environment, Environment)
        self._write_json(METRICS, metrics, EvaluationMetrics)

    def append_to_card(self, text: str) -> None:
        """Add a section to the checkpoint's model card."""
        card = self.pruned / "README.md"
        write_text(card, card.read_text(encoding="utf-8") + text)

    def _write_json(self, name: str, value: dict[str, Any], kind: type[Any]) -> None:
        # What this version writes it must also read: a mistake here is ours and ends the run.
        kind.model_validate_json(json.dumps(finite(value)), strict=True)
        write_json(self.path / name, value)

    # Reading

    @classmethod
    def open(cls, path: Path, option: str) -> FinishedRun:
        """The records of a finished pruning run; ``option`` named it, and begins every message.

        Raises:
            UserError: no finished run there, or a file that is not what it should be.
        """
        missing = [name for name in REQUIRED if not os.path.isfile(path / name)]
        if missing:
            raise UserError(
                f"{option}: '{path}' is no finished pruning run: it has no {', '.join(missing)}. Give a folder that "
                "'lightning-prune fit' has completed, for instance logs/wanda/version_0."
            )
        hint = "Run fit again."

        def read(name: str, kind: Any) -> Any:
            return read_json(path / name, kind, option, hint)

        reads_data = read("calibration.json", dict[str, Any]).get("dataset", "") is not None
        calibration = read("calibration.json", Calibration if reads_data else NoCalibration)
        run = FinishedRun(
            path=path,
            metrics=read(METRICS, RunMetrics),
            environment=read("environment.json", Environment),
            details=read("method.json", MethodDetails),
            calibration=calibration if reads_data else None,
            plan=PruningPlan.load(path / "plan.json", option),
            option=option,
            recovery=read(RECOVERY, Recovered) if os.path.lexists(path / RECOVERY) else None,
        )
        if run.plan.parameters != run.metrics.parameters.model_dump():
            raise UserError(f"{option}: plan.json and metrics.json in '{path}' are of different runs. {hint}")
        return run

    @classmethod
    def read_config(cls, path: Path, option: str) -> str:
        """The text of ``config.yaml``.

        Raises:
            UserError: no such file, or not UTF-8.
        """
        try:
            return read_file(path / "config.yaml", CONFIG_LIMIT, option).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{option}: '{path / 'config.yaml'}' is not UTF-8 ({error}).") from None

    @classmethod
    def finished_below(cls, parent: Path) -> list["RunFolder"]:
        """Finished runs of one system, by number."""
        found = [cls(entry) for entry in runs_below(parent)]
        return [folder for folder in found if folder.is_finished]

    def configuration_sha256(self) -> str | None:
        """The name of this run's result; None where it has none that can be read."""
        try:
            data = read_file(self.path / METRICS, CONFIG_LIMIT, self.option)
            return parse_json(data, RunMetrics, "").configuration_sha256
        except UserError:
            return None
