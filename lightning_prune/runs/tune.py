"""Options chosen by the loss on calibration samples that no measurement saw: one calibration, then decisions alone.

An eighth of the shared set is held out. The method measures on the rest once; every trial decides (and refits) from
those scores and is laid over the dense model, so no checkpoint is written. The search goes along one option at a time
and keeps what lowers the loss, until a whole round changes nothing or the trials are used up. Then budget is shifted
between the blocks of layers (``shifts.py``), where that is asked for.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.data.sampling import held_out_samples
from lightning_prune.evaluation.perplexity import measure_perplexity
from lightning_prune.methods.base import PruningMethod
from lightning_prune.methods.group_pruning import GroupPruning
from lightning_prune.methods.measurement import SavedMeasurement
from lightning_prune.models.families import family_of
from lightning_prune.models.fingerprint import base_model_sha256
from lightning_prune.models.loading import load_config
from lightning_prune.runs.build import Build, BuiltRun
from lightning_prune.runs.resume import facts_of
from lightning_prune.runs.shifts import Floats, directions, factors, search_shifts
from lightning_prune.runs.tensorboard import kept_fraction
from lightning_prune.runs.trials import Trial, Trials, read_trials
from lightning_prune.support.errors import UserError
from lightning_prune.support.progress import Progress

Options = Mapping[str, Any]
# In this order: the other options rank differently with a refit behind them.
AXES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("refit", ("residual", "output", "none")),
    ("allocation", ("global", "uniform")),
    ("score_norm", ("none", "kind", "block")),
    ("min_groups_per_layer", (0, 1)),
    ("freeze_first_n_layers", (0, 1, 2)),
    ("temperature", (0.0, 0.25, 0.5, 1.0)),
    ("tau", (None, 0.0)),
)


@dataclass(frozen=True)
class Limits:
    """How many options are tried, the first included, and then how many shifts of budget."""

    options: int
    shifts: int = 0


@dataclass(frozen=True)
class Tuned:
    """Every trial in order, the best of them, and the loss of the dense model on the same samples."""

    trials: list[Trial]
    dense_loss: float
    samples: int

    @property
    def best(self) -> Trial:
        """The lowest loss; of equal ones the first."""
        return min(self.trials, key=lambda trial: trial.loss)


def search(
    start: Options, axes: tuple[tuple[str, tuple[Any, ...]], ...], loss: Callable[[dict[str, Any]], float], limit: int
) -> Iterator[tuple[dict[str, Any], float]]:
    """Coordinate descent from ``start``; yields options and their loss, every setting once.

    Args:
        start: tried first; an axis whose option it lacks is not searched.
        axes: options and the values to try.
        loss: of complete options.
        limit: trials, the first included.
    """
    known: dict[tuple[Any, ...], float] = {}
    current, best, changed = dict(start), math.inf, True
    settings: list[tuple[str | None, tuple[Any, ...]]] = [(None, (None,))]
    while changed:
        changed = False
        for name, values in settings:
            for value in values:
                options = current if name is None else {**current, name: value}
                key = tuple(sorted((option, repr(of)) for option, of in options.items()))
                if key in known:
                    continue
                if len(known) == limit:
                    return
                known[key] = loss(options)
                yield dict(options), known[key]
                if known[key] < best:
                    current, best, changed = options, known[key], True
        settings = [(name, values) for name, values in axes if name in start]


def tune(
    configuration: dict[str, Any],
    build: Build,
    data: CalibrationDataModule,
    folder: Path,
    limits: Limits,
    kept: Path,
    resume: bool = False,
    progress: Progress | None = None,
) -> Iterator[Tuned]:
    """Try options of one method, then shifts of budget, and yield what is known after every trial.

    Args:
        configuration: of a run as ``fit`` takes it, with every option.
        build: makes trainer, method and data of a configuration.
        data: its calibration set is the one to tune on; what it evaluates on is not read.
        folder: for the two parts of the calibration set, on this machine.
        limits: how many trials.
        kept: file that holds all trials after every one of them.
        resume: begin with the trials in ``kept``, which are not made again.
        progress: shows how far calibrating is; None: nothing does.

    Raises:
        UserError: too few samples, or nothing to go on with.
        FloatingPointError: NaN or infinite values.
    """
    data.eval_datasets = []
    data.setup("fit")
    tokens = data.calibration.tokens
    chosen = held_out_samples(tokens)
    if not chosen.any():
        raise UserError(f"--data.num_samples: {len(tokens)} samples leave none to hold out; give 8 or more.")
    parts = {"measured": tokens[~chosen], "held_out": tokens[chosen]}
    for name, part in parts.items():
        np.save(folder / f"{name}.npy", part.numpy())
    base = copy.deepcopy(configuration)
    base["data"] |= {"dataset": str(folder / "measured.npy"), "eval_datasets": [str(folder / "held_out.npy")]}
    for option in ("num_samples", "seq_len", "sampling", "stride"):  # the rows of an array are the windows
        base["data"].pop(option, None)
    base["trainer"] |= {"logger": False, "enable_progress_bar": False, "default_root_dir": str(folder)}
    given = base["model"]["init_args"]
    pretrained = str(given["pretrained"])
    facts = facts_of(
        yaml.safe_dump(configuration), base_model_sha256(pretrained), data.calibration.manifest.fingerprint, processes=1
    )
    record = read_trials(kept, facts) if resume else Trials(facts)
    record.samples = int(chosen.sum())
    trials: list[Trial] = []
    measured: list[SavedMeasurement] = []

    def made(options: Options) -> BuiltRun:
        one = copy.deepcopy(base)
        one["model"]["init_args"] |= options
        return build("tune", one)

    def measure() -> SavedMeasurement:
        first = made({"refit": "none", "block_weights": None})
        first.model.progress = progress or first.model.progress
        with closing(first.model.progress):
            if record.dense_loss is None:
                record.dense_loss = _perplexity(first)  # before anything is laid over it
            return _measure(first)

    def loss(options: dict[str, Any], move: str = "") -> float:
        trial = record.known(options)
        if trial is None:
            measured[:] = measured or [measure()]
            started, run = time.perf_counter(), made(options)
            run.model.reuse(measured[0])
            _fit(run)
            blocks, fractions = kept_fraction(run.model.scores)
            shares = dict(zip(blocks, fractions.tolist(), strict=True))
            trial = Trial(options, _perplexity(run), time.perf_counter() - started, shares, move)
            record.trials.append(trial)
            record.write(kept)
        trials.append(trial)
        return trial.loss

    def found() -> Tuned:
        assert record.dense_loss is not None
        return Tuned(trials, record.dense_loss, record.samples)

    start = {name: given[name] for name, _ in AXES if name in given}
    axes = AXES if start.get("temperature") else tuple(axis for axis in AXES if axis[0] not in ("temperature", "tau"))
    for _ in search(start, axes, loss, limits.options):
        yield found()
    best = found().best
    if limits.shifts and best.options["allocation"] == "global":
        ways = directions(len(best.kept["mlp"]), family_of(load_config(pretrained)).whole_attention is None)
        known = np.log2(given["block_weights"]) if given.get("block_weights") else 0.0

        def shifted(move: str, x: Floats) -> float:
            return loss({**best.options, "block_weights": factors(x + known)}, move)

        for _ in search_shifts(ways, shifted, best.loss, limits.shifts):
            yield found()


def check_tunable(method: PruningMethod) -> None:
    """Refuse a method whose decisions cannot be made again from its scores.

    Raises:
        UserError: says which can.
    """
    if not isinstance(method, GroupPruning) or not method.reusable:
        raise UserError(
            f"--model: '{method.method}' cannot be tuned: a trial decides from saved scores, which methods that rank "
            "groups have (HGSP, Wanda and Magnitude with structure group and steps 1)."
        )


def tuned_config(configuration: dict[str, Any], found: Tuned) -> str:
    """The method's section with the best options, as YAML for ``--config``."""
    model = copy.deepcopy(configuration["model"])
    model["init_args"] |= found.best.options
    for name in ("pretrained", "label", "onload"):
        model["init_args"].pop(name, None)
    return str(yaml.safe_dump({"model": model}, sort_keys=False))


def _measure(run: BuiltRun) -> SavedMeasurement:
    _fit(run)
    return SavedMeasurement(run.model.scores, run.model.details(), run.model.calibration_facts())


def _fit(run: BuiltRun) -> None:
    run.model.writes = False
    run.datamodule.needs_calibration = run.model.needs_calibration
    run.trainer.fit(run.model, run.datamodule)


def _perplexity(run: BuiltRun) -> float:
    """Mean token loss in nats on the held-out samples, of what is laid over the dense model or of that one itself."""
    method = run.model
    (measured,) = measure_perplexity(
        run.trainer, run.datamodule, method.pretrained, "", method.slot, method.progress
    ).values()
    return math.log(measured.perplexity)
