"""Make every missing run of an experiment: one model in memory, one calibration set, scores shared over ratios."""

import fcntl
import gc
import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_prune.comparison.planned import Planned, plan_runs
from lightning_prune.comparison.report import next_version
from lightning_prune.comparison.settings import Settings
from lightning_prune.comparison.tables import Failure
from lightning_prune.errors import UserError
from lightning_prune.walk.module import PerplexityResult
from lightning_prune.methods.base import PruningMethod, SavedMeasurement
from lightning_prune.methods.scores import Scores
from lightning_prune.runs import check_writable, prune_and_record

RUNNING = ".running"


def run_experiment(settings: Settings) -> tuple[list[Path], list[Failure]]:
    """Make what is missing below ``settings.root`` and keep what is there.

    A run appears under its final name only when it is whole, so killing this process at any moment loses the run that
    was being made and nothing else. A run that raises is reported and the others go on.

    Returns:
        Folders of all finished runs of the experiment, in its order, and what failed.

    Raises:
        UserError: a mistake in the settings, or another experiment is running below the same root.
    """
    check_writable(settings.root)
    with _only_one(settings.root):
        planned = plan_runs(settings)
        folders = [run.finished(settings.root) for run in planned]
        missing = folders.count(None)
        print(f"{len(planned)} runs below {settings.root}: {len(planned) - missing} finished, {missing} to make")
        failures: list[Failure] = []
        with tqdm(total=missing, unit="run", disable=not missing, file=sys.stderr) as bar:
            for index, run in enumerate(planned):
                if folders[index] is not None:
                    continue
                bar.set_description(f"{run.label} {run.ratio:g}")
                known = [(other, found) for other, found in zip(planned, folders, strict=True) if found is not None]
                try:
                    folders[index] = _make(run, known, settings.root)
                except Exception as error:
                    if not isinstance(error, UserError):
                        traceback.print_exc()
                    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                    failures.append(Failure(run.label, run.ratio, f"{kind}{error}"))
                bar.update()
        return [folder for folder in folders if folder is not None], failures


def _make(
    run: Planned, known: Sequence[tuple[Planned, Path]], root: Path
) -> Path:
    """One run, in a folder that takes its name at the end."""
    parent = root / run.label
    shutil.rmtree(parent / RUNNING, ignore_errors=True)  # of a process that was killed
    cli = run.build()
    method: PruningMethod = cli.model
    logger = TensorBoardLogger(root, name=run.label, version=RUNNING, default_hp_metric=False)
    cli.trainer.logger = logger
    _reset_peak_memory()
    try:
        method.trainer = cli.trainer
        if method.reusable:
            _give_scores(method, run, known)
        prune_and_record(cli.trainer, method, run.data, cli.resolved_config, _dense(run, known))
        logger.finalize("success")
        folder = next_version(parent)
        os.rename(parent / RUNNING, folder)
    finally:
        shutil.rmtree(parent / RUNNING, ignore_errors=True)
        with suppress(OSError):
            parent.rmdir()  # empty only when the first run of a system failed
        del cli, method
        gc.collect()
    return folder


def _give_scores(method: PruningMethod, run: Planned, known: Sequence[tuple[Planned, Path]]) -> None:
    """What the same system measured for another ratio, if it did."""
    for other, folder in known:
        if other.label == run.label and other.measurement == run.measurement:
            calibration = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
            details = json.loads((folder / "method.json").read_text(encoding="utf-8"))
            saved = SavedMeasurement(
                scores=Scores.load(folder / "scores.csv"),
                details=details,
                calibration=calibration if method.needs_calibration else None,
                run=details.get("measured_by", str(folder)),
            )
            method.reuse(saved)
            return


def _dense(run: Planned, known: Sequence[tuple[Planned, Path]]) -> dict[str, PerplexityResult] | None:
    """The dense model's perplexities, if a finished run measured them on the same evaluation sets."""
    for other, folder in known:
        if other.dense == run.dense:
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            values = {name: (item["dense"], item["tokens"]) for name, item in metrics["perplexity"].items()}
            if all(value is not None for value, _ in values.values()):
                return {name: PerplexityResult(*pair) for name, pair in values.items()}
    return None


@contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Hold ``root/.compare.lock``; the system lets go of it when the process ends, however it ends."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".compare.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--root: another 'lightning-prune compare' is running below '{root}'. Wait, or choose another root."
            ) from None
        for left in (root / "comparison").glob(".version_*"):  # a report that a killed process was writing
            shutil.rmtree(left, ignore_errors=True)
        yield


def _reset_peak_memory() -> None:
    """So that every run's peak is its own; the process's would only ever grow."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: forget the high-water mark
