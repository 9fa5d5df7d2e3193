"""Options chosen by the distance from the dense model on an eighth of the calibration samples, which is held out.

The method measures on the rest once; every trial decides (and refits) from those scores on the dense model in memory.
KL(dense ‖ pruned) compares whole distributions, so few tokens tell more than their labels would.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.tensorboard import SummaryWriter

from lightning_prune.checkpoint.scores import BLOCKS
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.data.sampling import held_out_samples
from lightning_prune.evaluation.perplexity import Measured, measure
from lightning_prune.methods.base import PruningMethod
from lightning_prune.methods.group_pruning import GroupPruning
from lightning_prune.methods.measurement import SavedMeasurement
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.runs.build import RunBuilder, build
from lightning_prune.runs.resume import Facts, differences, facts_of
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import write_json
from lightning_prune.support.progress import Progress
from lightning_prune.support.validation import read_json

Options = dict[str, Any]
Axes = tuple[tuple[str, tuple[Any, ...]], ...]
# In this order: the other options rank differently where a refit follows.
AXES: Axes = (
    ("refit", ("residual", "output", "none")),
    ("allocation", ("global", "uniform")),
    ("score_norm", ("none", "kind", "block")),
    ("min_groups_per_layer", (0, 1)),
    ("freeze_first_n_layers", (0, 1, 2)),
    ("temperature", (0.0, 0.25, 0.5, 1.0)),
    ("tau", (None, 0.0)),
)


@dataclass(frozen=True)
class Trial:
    """Options of the method, KL(dense ‖ pruned) and loss in nats per held-out token, what it took, and by block the
    kept fraction of every layer."""

    options: Options
    divergence: float
    loss: float
    seconds: float
    kept: dict[str, list[float]]


@dataclass(frozen=True)
class Tuned:
    """All trials so far, in order, as the file has them: ``facts`` are what a search that continues must share,
    ``dense_loss`` is the dense model's on the held-out ``samples``."""

    facts: Facts
    dense_loss: float
    samples: int
    trials: list[Trial]

    @property
    def best(self) -> Trial:
        """The lowest divergence; of equal ones the first."""
        return min(self.trials, key=lambda trial: trial.divergence)


def search(start: Options, axes: Axes, divergence: Callable[[Options], float], limit: int) -> Iterator[Options]:
    """Coordinate descent from ``start`` along the ``axes`` whose option it has, until a round changes nothing: yields
    the options of every trial, each once, ``limit`` at most. What ``divergence`` refuses after the first is left out.
    """
    tried: list[Options] = []
    current, best, changed = dict(start), math.inf, True
    settings = [{}, *({name: value} for name, values in axes if name in start for value in values)]
    while changed:
        changed = False
        for setting in settings:
            options = current | setting
            if options in tried:
                continue
            if len(tried) == limit:
                return
            tried.append(options)
            try:
                value = divergence(options)
            except UserError as error:  # a value that this model, or the ratio, does not allow
                if len(tried) == 1:
                    raise
                rank_zero_warn(f"Left out {', '.join(f'{name} {one}' for name, one in setting.items())}: {error}")
                continue
            yield options
            if value < best:
                current, best, changed = options, value, True


def tune(
    configuration: Options,
    data: CalibrationDataModule,
    folder: Path,
    limit: int,
    file: Path,
    resume: bool,
    progress: Progress,
) -> Iterator[Tuned]:
    """Try options of one method, and yield what is known after every trial.

    ``configuration`` is that of a run as ``fit`` takes it, with every option. The two parts of the calibration set go
    to ``folder``. ``file`` has all trials after every one of them; with ``resume`` those in it are not made again.

    Raises:
        UserError: too few samples, or nothing to resume.
        FloatingPointError: NaN or infinite values.
    """
    data.eval_datasets = []
    data.setup("fit")
    held_out = held_out_samples(data.calibration.tokens)
    if not held_out.any():
        raise UserError(f"--data.num_samples: {len(held_out)} samples leave none to hold out; give 8 or more.")
    for name, part in (("measured", ~held_out), ("held_out", held_out)):
        np.save(folder / f"{name}.npy", data.calibration.tokens[part].numpy())
    given = configuration["model"]["init_args"]
    weights, fingerprint = Checkpoint.open(given["pretrained"]).fingerprint, data.calibration.manifest.fingerprint
    facts = facts_of(configuration, weights, fingerprint, processes=1)
    before = _read(file, facts) if resume else None
    trials = _Trials(configuration, folder, progress)
    dense = _loss(trials.measured[1]) if before is None else before.dense_loss
    tuned = Tuned(facts, dense, int(held_out.sum()), [])

    def divergence(options: Options) -> float:
        known = [trial for trial in before.trials if trial.options == options] if before else []
        tuned.trials.append(known[0] if known else trials.make(options))
        if not known:
            write_json(file, asdict(tuned))
        return tuned.trials[-1].divergence

    start = {name: given[name] for name, _ in AXES if name in given}
    axes = AXES if start.get("temperature") else AXES[:-2]  # without temperature and tau
    for _ in search(start, axes, divergence, limit):
        yield tuned


class _Trials:
    """Runs that differ in a few options of the method: measured once on its part of the samples, then decided."""

    def __init__(self, configuration: Options, folder: Path, progress: Progress) -> None:
        self.folder, self.progress = folder, progress
        parts = {"dataset": str(folder / "measured.npy"), "eval_datasets": [str(folder / "held_out.npy")]}
        # The rows of an array are the windows.
        windows = ("num_samples", "seq_len", "sampling", "stride", "split", "column")
        data = {name: value for name, value in configuration["data"].items() if name not in windows} | parts
        quietly = {"logger": False, "enable_progress_bar": False, "default_root_dir": str(folder)}
        self.base = configuration | {"data": data, "trainer": configuration["trainer"] | quietly}

    @cached_property
    def measured(self) -> tuple[SavedMeasurement, Measured]:
        """The method's measurements, and the dense model's results on the held-out samples."""
        run = self._built({"refit": "none"})
        run.model.progress = self.progress
        with closing(self.progress):
            dense = _evaluated(run, scratch=self.folder)  # before anything is decided
            run.trainer.fit(run.model, run.datamodule)
        return SavedMeasurement(run.model.scores, run.model.details(), run.model.calibration_facts()), dense

    def make(self, options: Options) -> Trial:
        """Decide with ``options`` on the open dense model, and measure that."""
        started, run = time.perf_counter(), self._built(options, self.measured[0])
        run.trainer.fit(run.model, run.datamodule)
        scores = run.model.scores
        kept = {str(block): scores.kept_fraction(block).tolist() for block in BLOCKS if scores.of_kind(block).any()}
        measured = _evaluated(run, reference=self.measured[1])
        (distance,) = measured.distance.values()
        return Trial(options, distance.kl_divergence, _loss(measured), time.perf_counter() - started, kept)

    def _built(self, options: Options, measured: SavedMeasurement | None = None) -> RunBuilder:
        run = build("tune", self.base | {"model": _with(self.base["model"], options)})
        if measured is not None:
            run.model.reuse(measured)
        run.model.writes = False
        run.datamodule.needs_calibration = run.model.needs_calibration
        return run


def _evaluated(run: RunBuilder, scratch: Path | None = None, reference: Measured | None = None) -> Measured:
    """Evaluate the decision, or the dense model before there is one, on the held-out samples."""
    model = run.model
    return measure(run.trainer, run.datamodule, model.checkpoint, "", model.slot, model.progress, scratch, reference)


def _loss(measured: Measured) -> float:
    """Mean token loss in nats."""
    (result,) = measured.perplexity.values()
    return math.log(result.perplexity)


def _read(file: Path, facts: Facts) -> Tuned:
    if not file.is_file():
        raise UserError(f"--resume: no trials in '{file}'. Leave --resume out to start again.")
    tuned = read_json(file, Tuned, "--resume", "Leave --resume out and give --overwrite to start again.")
    if different := differences(tuned.facts, facts):
        raise UserError(
            f"--resume: the trials in '{file}' were made from something else: {'; '.join(different)}. Give what they "
            "were made from, or --overwrite in place of --resume."
        )
    return tuned


def check_tunable(method: PruningMethod) -> None:
    """Raise UserError for a method whose decisions cannot be made again from its scores."""
    if not isinstance(method, GroupPruning) or not method.reusable:
        raise UserError(
            f"--model: '{method.method}' cannot be tuned: a trial decides from saved scores, which methods that rank "
            "groups have (HGSP, Wanda and Magnitude with structure group and steps 1)."
        )


def tuned_config(configuration: Options, tuned: Tuned) -> str:
    """The method's section with the best options, as YAML for ``--config``."""
    model = _with(configuration["model"], tuned.best.options)
    for name in ("pretrained", "label", "onload"):
        model["init_args"].pop(name, None)
    return str(yaml.safe_dump({"model": model}, sort_keys=False))


def _with(model: Options, options: Options) -> Options:
    return model | {"init_args": model["init_args"] | options}


def log_trial(writer: SummaryWriter, tuned: Tuned) -> None:
    """The newest trial, and the best so far; the step is the trial's number."""
    writer.add_scalar("held-out KL/trial", tuned.trials[-1].divergence, len(tuned.trials))
    writer.add_scalar("held-out KL/best so far", tuned.best.divergence, len(tuned.trials))
    writer.add_scalar("held-out loss/trial", tuned.trials[-1].loss, len(tuned.trials))
    writer.flush()


def log_kept(folder: Path, tuned: Tuned) -> None:
    """Kept fraction of both blocks, a run for the first trial and one for the best; the step is the layer."""
    for name, trial in (("first", tuned.trials[0]), ("best", tuned.best)):
        with SummaryWriter(str(folder / name)) as writer:
            for block, shares in trial.kept.items():
                for layer, share in enumerate(shares):
                    writer.add_scalar(f"kept fraction/{block}", share, layer)
