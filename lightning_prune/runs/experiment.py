"""An experiment: check every run first, make the missing ones; text, dense perplexity and scores are shared."""

import gc
import json
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.evaluation.perplexity import Measured
from lightning_prune.methods.base import PruningMethod
from lightning_prune.methods.target import SIZES
from lightning_prune.runs.build import build
from lightning_prune.runs.folder import RunFolder, runs_below, sweep_runs
from lightning_prune.runs.records import Failure
from lightning_prune.runs.resume import configuration_sha256
from lightning_prune.runs.reuse import reuse
from lightning_prune.runs.run import prune_and_record
from lightning_prune.runs.settings import Settings
from lightning_prune.support.devices import reset_peak
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import Lock, cannot_write, made
from lightning_prune.support.progress import Progress

LOCK = ".compare.tmp"  # as a temporary file it is swept when its process is gone


@dataclass
class Planned:
    """One run of the experiment; the three hashes are of ``configuration_sha256``."""

    label: str
    size: float | str  # a ratio, or a target
    seed: int | None  # of its calibration samples; None where the experiment names none
    configuration: dict[str, Any]  # what ``fit`` would be given
    data: CalibrationDataModule  # shared by all runs with the same ``data`` section
    sha256: str  # names its result
    measurement: str  # names what it measures, which is the same at every ratio of a system
    dense: str  # names the evaluation of the dense model, the same for most systems
    folder: Path | None = None  # once it is finished

    @property
    def name(self) -> str:
        """Label, size and seed, for messages."""
        return f"{self.label} {self.size}{'' if self.seed is None else f' seed {self.seed}'}"


def plan_runs(settings: Settings) -> list[Planned]:
    """Check every run's options, by building it, and tokenise every calibration setting once. A system on which another
    seed changes nothing (it reads no data, or token ids as given) runs once. UserError for a mistake in any of them."""
    shared: dict[str, CalibrationDataModule] = {}
    weights: dict[str, str] = {}
    planned: list[Planned] = []
    seeds: list[int | None] = [*settings.seeds] or [None]
    sizes: list[float | str] = [*(settings.targets or settings.ratios)]
    for label, seed, size in product(settings.systems, seeds, sizes):
        configuration = settings.configuration(label, size, seed)
        built = build(label, configuration)
        options = yaml.safe_load(built.resolved_config)
        data = shared.setdefault(json.dumps(options["data"], sort_keys=True), built.datamodule)
        # The first system may read no data; the evaluation's check against the calibration text needs both.
        data.needs_calibration = True
        if settings.show_progress:
            data.show_progress()
        method = built.model
        if method.pretrained not in weights:
            method.checkpoint.check(method.keep == "whole")
            weights[method.pretrained] = method.checkpoint.fingerprint
        data.take_model(method.checkpoint.limits[1])
        data.setup("fit")
        init = options["model"]["init_args"]
        calibration = data.calibration.manifest.fingerprint if method.needs_calibration else None
        base = (str(built.trainer.precision), weights[method.pretrained])
        name = type(method).__name__
        sha256 = configuration_sha256(name, init, *base, calibration, data.fingerprints)
        if any((run.label, run.sha256) == (label, sha256) for run in planned):
            continue
        sizeless = init | dict.fromkeys(("pruning_ratio", *SIZES))
        measurement = configuration_sha256(name, sizeless, *base, calibration, {})
        held_out = {item.name: item.manifest["fingerprint"] for item in data.evaluation}
        dense = configuration_sha256("dense", {"continuations": data.continuations}, *base, None, held_out)
        planned.append(Planned(label, size, seed, configuration, data, sha256, measurement, dense))
    return planned


def run_experiment(settings: Settings) -> tuple[list[Path], list[Failure]]:
    """Make what is missing below ``settings.root``; folders of all finished runs in their order, and what failed.

    Raises:
        UserError: a mistake in the settings, or another experiment is running below the same root.
    """
    failures: list[Failure] = []
    with _only_one(settings.root):
        planned = plan_runs(settings)
        for label in settings.systems:
            sweep_runs(settings.root / label)
        for run in planned:
            run.folder = _finished(run, settings.root)
        missing = [run for run in planned if run.folder is None]
        finished = len(planned) - len(missing)
        print(f"{len(planned)} runs below {settings.root}: {finished} finished, {len(missing)} to make")
        with closing(Progress(settings.show_progress)) as progress, ExitStack() as stack:
            for run in missing:
                progress.expect(run.name, 1)
            # Of the last run's dense model, for the next one that needs the same: its residual streams take memory.
            dense: list[Measured] = []
            stack.callback(_forget, dense)
            measured = ""
            for run in missing:
                if run.dense != measured:
                    _forget(dense)
                    measured = run.dense
                try:
                    run.folder = _make(run, planned, dense, progress)
                except Exception as error:
                    if not isinstance(error, UserError):
                        traceback.print_exc()
                    seed = "" if run.seed is None else f"seed {run.seed}: "
                    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                    failures.append(Failure(run.label, run.size, f"{seed}{kind}{error}"))
                except BaseException as error:  # an interrupt says what is kept
                    kept = f"{sum(one.folder is not None for one in planned)} finished runs below '{settings.root}'"
                    error.add_note(f"{kept} are kept; the same command makes the missing ones")
                    raise
                progress.finish(run.name)
    return [run.folder for run in planned if run.folder is not None], failures


def _finished(run: Planned, root: Path) -> Path | None:
    """The folder of a finished run with the same result, whichever command made it."""
    for path in runs_below(root / run.label):
        with suppress(UserError):  # not finished, or damaged
            if RunFolder.open(path, "--root").metrics.configuration_sha256 == run.sha256:
                return path
    return None


def _forget(dense: list[Measured]) -> None:
    while dense:
        dense.pop().close()


def _make(run: Planned, planned: Sequence[Planned], dense: list[Measured], progress: Progress) -> Path:
    """Make one run, which takes over the measurements of finished ones."""
    # Every run's peak memory is its own: without what the last one left, and the process's would only ever grow.
    gc.collect()
    reset_peak()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: forget the high-water mark
    built = build(run.label, run.configuration)
    method: PruningMethod = built.model
    method.trainer = built.trainer
    method.progress = progress.part(run.name)
    # What the same system measured for another ratio.
    for one in planned:
        if one.folder and (one.label, one.measurement) == (run.label, run.measurement) and method.reusable:
            reuse(method, RunFolder.open(one.folder, "--root"))
            break
    return prune_and_record(built.trainer, method, run.data, built.resolved_config, dense)[0]


@contextmanager
def _only_one(root: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(made(root))
            lock = Lock.take(root / LOCK, create=True, own=True)
        except (OSError, ValueError) as error:
            raise cannot_write(root, "--root", error) from None
        if lock is None:
            raise UserError(
                f"--root: another 'lightning-prune compare' is running below '{root}'. Wait, or choose another root."
            )
        stack.callback(lock.remove)
        yield
