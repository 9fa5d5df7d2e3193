"""Make every missing run of an experiment; text, dense perplexity and scores are shared."""

import gc
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import torch

from lightning_prune.evaluation.perplexity import PerplexityResult
from lightning_prune.methods.base import PruningMethod
from lightning_prune.runs.build import build
from lightning_prune.runs.failure import Failure
from lightning_prune.runs.folder import RunFolder
from lightning_prune.runs.planned import Planned, plan_runs
from lightning_prune.runs.reuse import known_perplexities, reuse
from lightning_prune.runs.run import prune_and_record
from lightning_prune.runs.settings import Settings
from lightning_prune.runs.tidy import sweep_runs
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import Lock, cannot_write, nearest_existing, remove_empty_parents
from lightning_prune.support.progress import Progress

LOCK = ".compare.tmp"  # as a temporary file it is swept when its process is gone


def run_experiment(settings: Settings) -> tuple[list[Path], list[Failure]]:
    """Make what is missing below ``settings.root`` and keep what is there.

    A run that was being made when this process was killed is made again by the next call, and nothing else is lost. A
    run that raises is reported and the others go on.

    Returns:
        Folders of all finished runs of the experiment, in its order, and what failed.

    Raises:
        UserError: a mistake in the settings, or another experiment is running below the same root.
    """
    with _only_one(settings.root):
        planned = plan_runs(settings)
        for label in settings.systems:
            sweep_runs(settings.root / label)
        folders = [run.finished(settings.root) for run in planned]
        missing = folders.count(None)
        print(f"{len(planned)} runs below {settings.root}: {len(planned) - missing} finished, {missing} to make")
        failures: list[Failure] = []
        with _counted(folders, settings.root), closing(Progress(settings.show_progress)) as progress:
            for run, folder in zip(planned, folders, strict=True):
                if folder is None:
                    progress.expect(run.name, 1)
            for index, run in enumerate(planned):
                if folders[index] is not None:
                    continue
                known = [(other, found) for other, found in zip(planned, folders, strict=True) if found is not None]
                try:
                    folders[index] = _make(run, known, progress)
                except Exception as error:
                    if not isinstance(error, UserError):
                        traceback.print_exc()
                    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                    message = f"{kind}{error}" if run.seed is None else f"seed {run.seed}: {kind}{error}"
                    failures.append(Failure(run.label, run.ratio, message))
                progress.finish(run.name)
        return [folder for folder in folders if folder is not None], failures


def _make(run: Planned, known: Sequence[tuple[Planned, Path]], progress: Progress) -> Path:
    """One run."""
    built = build(run.label, run.configuration)
    method = built.model
    _reset_peak_memory()
    try:
        method.trainer = built.trainer
        method.progress = progress.part(run.name)
        if method.reusable:
            _give_scores(method, run, known)
        folder, _ = prune_and_record(built.trainer, method, run.data, built.resolved_config, _dense(run, known))
    finally:
        del built, method
        gc.collect()
    return folder


def _give_scores(method: PruningMethod, run: Planned, known: Sequence[tuple[Planned, Path]]) -> None:
    """What the same system measured for another ratio, if it did."""
    for other, folder in known:
        if other.label == run.label and other.measurement == run.measurement:
            reuse(method, RunFolder.open(folder, "--root"))
            return


def _dense(run: Planned, known: Sequence[tuple[Planned, Path]]) -> dict[str, PerplexityResult] | None:
    """The dense model's perplexities, if a finished run measured them on the same evaluation sets."""
    for other, folder in known:
        if other.dense == run.dense:
            found = known_perplexities(RunFolder.open(folder, "--root"), run.data)
            if found is not None:
                return found
    return None


@contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Hold a lock in ``root``; the system lets go of it when the process ends, however it ends."""
    try:
        there_before = nearest_existing(root)
        root.mkdir(parents=True, exist_ok=True)
        lock = Lock.take(root / LOCK, create=True, own=True)
    except (OSError, ValueError) as error:
        raise cannot_write(root, "--root", error) from None
    if lock is None:
        raise UserError(
            f"--root: another 'lightning-prune compare' is running below '{root}'. Wait, or choose another root."
        )
    try:
        yield
    finally:
        lock.remove()
        remove_empty_parents(root / LOCK, there_before)


@contextmanager
def _counted(folders: Sequence[Path | None], root: Path) -> Iterator[None]:
    """Say in an interrupt's message what stays."""
    try:
        yield
    except BaseException as error:
        finished = len(folders) - list(folders).count(None)
        error.add_note(f"{finished} finished runs below '{root}' stay; the same command makes the missing ones")
        raise


def _reset_peak_memory() -> None:
    """So that every run's peak is its own; the process's would only ever grow."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: forget the high-water mark
