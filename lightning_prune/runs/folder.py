"""The run folder: claimed by one process, written file by whole file, read back as types. Nothing else touches it.

Whoever made it with ``mkdir`` holds its file ``unfinished`` with ``flock`` until the run is finished; an ``unfinished``
that nobody holds is that of a run that was killed or failed.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from filecmp import cmp
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.checkpoint.scores import Scores
from lightning_prune.runs.records import (
    Calibration,
    Environment,
    MethodDetails,
    NoCalibration,
    Recovered,
    RunMetrics,
    as_dict,
)
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import Lock, cannot_write, finite, made, sweep, writable, write_json, write_text
from lightning_prune.support.names import LAYER_RESULTS, PRUNED, TRAINING
from lightning_prune.support.validation import read_json

METRICS = "metrics.json"  # written last: a folder that has it is that of a finished run
RECOVERY = "recovery.json"
REQUIRED = (METRICS, "config.yaml", "scores.csv", "plan.json", "method.json", "calibration.json", "environment.json")
UNFINISHED = "unfinished"
STARTED = "started.json"  # what the layer results of an unfinished run are made from
REPORTS = "comparison"  # the folder below a root in which ``compare`` writes reports
NO_DATA: dict[str, Any] = {"dataset": None, "note": "this method reads no data"}  # its calibration.json
LABEL = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
# What a killed run cannot be continued from or learned from.
WORTHLESS = re.compile(
    r"config\.yaml|[0-9.e-]+%|hparams\.yaml|started\.json|unfinished|.*tfevents.*|\..*\.tmp"
    r"|report\.(html|md)|results\.(csv|tex)|precision\.csv|calibration_appendix\.md|tensorboard"
)


def check_label(label: str, option: str = "--model.label") -> str:
    """``label``, which may name a folder, else UserError."""
    if not LABEL.fullmatch(label):
        raise UserError(
            f"{option}: found {label[:200]!r}; a name consists of up to 200 letters, digits, '.', '_' and '-' and "
            "does not start with '.', because it names a folder."
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

    @property
    def calibration_facts(self) -> dict[str, Any] | None:
        """``calibration.json``; None for a method that reads no data."""
        return None if self.calibration is None else as_dict(self.calibration)

    @cached_property
    def scores(self) -> Scores:
        """``scores.csv``; UserError unless it is complete and in agreement with the plan."""
        path = self.path / "scores.csv"
        scores = Scores.read(path, self.option)
        try:
            scores.check_plan(self.plan)
        except ValueError as error:
            raise UserError(f"{self.option}: '{path}' does not belong to its plan ({error}).") from None
        return scores


class RunFolder:
    """One run folder, by its path. ``claim`` gives one to write, ``open`` the records of a finished one."""

    def __init__(self, path: Path, lock: Lock | None = None) -> None:
        self.path = path
        self.pruned = path / PRUNED
        self._lock = lock  # on ``unfinished``, while this process makes the run

    @classmethod
    @contextmanager
    def claim(
        cls, root: Path, label: str, option: str = "--trainer.default_root_dir", again: Path | None = None
    ) -> Iterator["RunFolder"]:
        """The next ``<root>/<label>/version_N``, for this process alone, or the unfinished run ``again``.

        At the end of the block the folder is a finished run. If the block raises, the folder is removed unless it holds
        something worth keeping; then it stays marked ``unfinished``, and the exception carries a note that says so.

        Raises:
            UserError: a label that is not a name, nothing can be written there, or the run to continue is running.
        """
        check_label(label)
        parent = root / label
        with ExitStack() as stack:
            try:
                stack.enter_context(made(parent))
                folder = cls._next(parent) if again is None else cls(again, Lock.take(again / UNFINISHED))
            except (OSError, ValueError) as error:
                raise cannot_write(root, option, error) from error
            if folder._lock is None:
                raise UserError(
                    f"--resume: the run in '{again}' is still under way. Wait for it, or leave --resume out."
                )
            try:
                with writable(root, option):
                    yield folder
            except BaseException as error:
                folder._close_after(error)
                raise
        folder._finish()
        sweep_runs(parent)

    @classmethod
    def _next(cls, parent: Path) -> "RunFolder":
        """The next number. Others claim and tidy at the same time: whoever made the folder and finds nothing but its
        own mark in it has it, everybody else tries again."""
        while True:
            parent.mkdir(parents=True, exist_ok=True)
            sweep(parent.parent)
            sweep_runs(parent)
            with suppress(FileExistsError, FileNotFoundError), ExitStack() as undo:
                path = parent / f"version_{1 + max(map(version, os.listdir(parent)), default=-1)}"
                path.mkdir()
                undo.callback(sweep_runs, parent)
                if (lock := Lock.take(path / UNFINISHED, create=True, own=True)) is not None:
                    undo.callback(lock.remove)
                    # More in it: swept as empty before it was marked, and then made by somebody else.
                    if os.listdir(path) == [UNFINISHED]:
                        lock.write(json.dumps({"process": os.getpid(), "host": os.uname().nodename}) + "\n")
                        undo.pop_all()
                        return cls(path, lock)

    def _finish(self) -> None:
        self.forget_progress()
        if self._lock is not None:
            self._lock.remove()

    def _close_after(self, error: BaseException) -> None:
        """Keep what may be of use, and say so in a note on ``error``; else remove the folder."""
        if not self.path.is_dir():
            return
        # The same run would end the same way: numbers that overflow, options that cannot be met. A full disk can be
        # emptied.
        mistake = isinstance(error, UserError) and not isinstance(error.__cause__, OSError)
        if mistake or isinstance(error, FloatingPointError):
            self.forget_progress()
        finished = self.is_finished
        if finished or self.leftovers():
            kept = ", ".join(sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")))
            state = "is finished" if finished else "is not finished"
            error.add_note(f"'{self.path}' stays and {state}; it holds {kept}")
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        if finished:
            self._finish()
        elif (self.path / STARTED).is_file():
            for name, command in ((TRAINING, "recover"), (LAYER_RESULTS, "fit")):
                if (self.path / name).is_dir():
                    line = f"lightning-prune {command} --config {self.path}/config.yaml --resume"
                    error.add_note(f"'{line}' continues from there")
        if self._lock is not None:
            self._lock.release()

    @property
    def is_finished(self) -> bool:
        """Whether the run has written its results."""
        return (self.path / METRICS).is_file()

    @property
    def is_pruning_run(self) -> bool:
        """Whether this is a finished run of a method, and whole."""
        return all((self.path / name).is_file() for name in REQUIRED)

    def leftovers(self) -> list[str]:
        """Names of useful results in an unfinished run's folder: scores, a plan, a checkpoint, layer results."""
        names = sorted(name for name in os.listdir(self.path) if not WORTHLESS.fullmatch(name))
        states = {LAYER_RESULTS: "step_*.safetensors", TRAINING: "*.ckpt"}
        return [name for name in names if name not in states or any((self.path / name).glob(states[name]))]

    def forget_progress(self) -> None:
        """Remove what only an unfinished run needs."""
        for name in (LAYER_RESULTS, TRAINING):
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / STARTED).unlink(missing_ok=True)

    def write_config(self, text: str) -> None:
        """Write the run's resolved configuration, YAML ``text``."""
        write_text(self.path / "config.yaml", text)

    def write_decision(self, scores: Scores, plan: PruningPlan, details: dict[str, Any]) -> None:
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
        """``recovery.json``: what was trained, on which text, from which run."""
        self._write_json(RECOVERY, facts, Recovered)

    def write_results(self, calibration: dict[str, Any], environment: dict[str, Any], metrics: dict[str, Any]) -> None:
        """The records of a run, ``metrics.json`` last; ``calibration`` is empty for one that only evaluates."""
        if calibration:
            kind = NoCalibration if calibration["dataset"] is None else Calibration
            self._write_json("calibration.json", calibration, kind)
        self._write_json("environment.json", environment, Environment)
        self._write_json(METRICS, metrics, RunMetrics if calibration else None)

    def append_to_card(self, text: str) -> None:
        """Append Markdown to the model card of the pruned checkpoint."""
        card = self.pruned / "README.md"
        write_text(card, card.read_text(encoding="utf-8") + text)

    def _write_json(self, name: str, value: dict[str, Any], kind: type[BaseModel] | None) -> None:
        if kind is not None:  # What this version writes it must also read: a mistake here is ours and ends the run.
            kind.model_validate_json(json.dumps(finite(value)), strict=True)
        write_json(self.path / name, value)

    @classmethod
    def open(cls, path: Path, option: str) -> FinishedRun:
        """The records of a finished pruning run; where there is none, or a file is not what it should be, UserError,
        which begins with the ``option`` that named it."""
        if not os.path.isdir(path):
            raise UserError(f"{option}: there is no folder '{path}'. Give a run folder, such as logs/wanda/version_0.")
        if missing := [name for name in REQUIRED if not os.path.isfile(path / name)]:
            why = meant(path) or (
                f": it has no {', '.join(missing)}. Give a folder that 'lightning-prune fit' has completed, for "
                "instance logs/wanda/version_0."
            )
            raise UserError(f"{option}: '{path}' is not a finished pruning run{why}")

        def read(name: str, kind: Any) -> Any:
            return read_json(path / name, kind, option, "Run fit again.")

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
        if run.plan.parameters != run.metrics.parameters.model_dump(exclude_none=True):
            raise UserError(f"{option}: plan.json and metrics.json in '{path}' are of different runs. Run fit again.")
        return run


def meant(path: Path) -> str:
    """The end of a message on a folder that is not of a run: names the one that was probably meant, the newest inside
    it or the one whose checkpoint it is; empty where there is neither."""
    if path.name == PRUNED and RunFolder(path.parent).is_pruning_run:
        return f". '{path}' is the checkpoint of a run: give the run's folder, '{path.parent}'."
    inside = [one for one in runs_below(path) if RunFolder(one).is_pruning_run]
    return f". Runs are inside '{path}': give '{inside[-1]}'." if inside else ""


def version(name: str) -> int:
    """N of ``version_N``; -1 for any other name."""
    return int(name[8:]) if re.fullmatch(r"version_[0-9]{1,18}", name) else -1


def runs_below(parent: Path) -> list[Path]:
    """The ``version_N`` folders in ``parent``, by number."""
    try:
        folders = [entry for entry in parent.iterdir() if version(entry.name) >= 0 and entry.is_dir()]
    except OSError:
        return []
    return sorted(folders, key=lambda entry: version(entry.name))


def sweep_runs(parent: Path) -> None:
    """Tidy up after killed runs in ``parent``: their temporary files, and their folders where those are of no use.

    An unfinished folder is of no use when it holds nothing but its configuration and events, or when a finished run has
    the same configuration. Folders of runs that live and folders that are not ours are not touched.
    """
    sweep(parent)
    for path in runs_below(parent):
        for place in (path, path / LAYER_RESULTS, *(path / LAYER_RESULTS).glob("stage_*"), path / PRUNED):
            sweep(place)
        with suppress(OSError):
            if not (path / UNFINISHED).exists():
                if not any(path.iterdir()):
                    path.rmdir()  # killed, or about to be claimed: then the claimant takes the next number
            elif (lock := Lock.take(path / UNFINISHED)) is not None:
                folder = RunFolder(path, lock)
                try:
                    if folder.is_finished:
                        folder._finish()
                    elif not folder.leftovers() or _made_again(path / "config.yaml"):
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    lock.release()


def _made_again(config: Path) -> bool:
    finished = [path / config.name for path in runs_below(config.parents[1]) if RunFolder(path).is_finished]
    return config.is_file() and any(one.is_file() and cmp(one, config, shallow=False) for one in finished)
