"""One run, start to end: dense perplexity → calibrate and prune → pruned perplexity → record."""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

import lightning as L
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.evaluation.perplexity import (
    Evaluation,
    PerplexityResult,
    evaluation_phase,
    evaluation_work,
    measure_perplexity,
    unigram_perplexity,
)
from lightning_prune.methods.base import PruningMethod
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.runs.configuration import configuration_sha256
from lightning_prune.runs.environment import environment, peak_memory_bytes
from lightning_prune.runs.folder import RunFolder, check_label
from lightning_prune.runs.memory_estimate import memory_advice, place
from lightning_prune.runs.numerics import numerical_advice
from lightning_prune.runs.resume import facts_of, keep_dense, known_dense, unfinished_run, write_facts
from lightning_prune.runs.summary import RunRecord, run_metrics
from lightning_prune.runs.tensorboard import hparams, log_importance
from lightning_prune.runs.tidy import events_folder
from lightning_prune.runs.verdict import evaluation_section
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import FULL


def prune_and_record(
    trainer: L.Trainer,
    method: PruningMethod,
    data: CalibrationDataModule,
    config: str,
    dense: dict[str, PerplexityResult] | None = None,
    resume: bool = False,
) -> tuple[Path, RunRecord]:
    """Run one method and leave a complete run folder.

    Args:
        trainer: a fresh trainer; the run folder is claimed below its ``default_root_dir``.
        method: what to run.
        data: calibration and evaluation sets.
        config: the resolved configuration as YAML, for ``config.yaml``.
        dense: perplexities of the dense model where they are known already.
        resume: go on with the unfinished run of the same configuration; the result is that of an undisturbed one.

    Returns:
        The run folder and its record.

    Raises:
        UserError: a mistake in the input, or a device that is too small; nothing has been written then. Or the disk is
            full.
        FloatingPointError: NaN or infinite values; says where, and what would help.
    """
    started = time.perf_counter()
    check_label(method.label)
    method.check_model()
    data.needs_calibration = method.needs_calibration
    with method.seconds.measure("tokenise"):
        data.setup("fit")
    place(trainer, method, data)
    calibration = data.calibration.manifest.fingerprint if method.needs_calibration else None
    facts = facts_of(config, method.checkpoint.fingerprint, calibration, trainer.world_size)
    again = None
    if resume and trainer.is_global_zero:
        again = unfinished_run(Path(trainer.default_root_dir), method.label, facts)
    claim = claimed(trainer, method.label, config, again, events=events_folder(method.requested_ratio))
    with (
        claim as folder,
        memory_advice(method, data),
        numerical_advice(trainer, method),
        closing(method.progress),
    ):
        method.run_folder = folder
        work = evaluation_work(data, len(method.layers)) * (1 - method.pruning_ratio)
        method.progress.expect(evaluation_phase("pruned"), work)
        if folder is not None and method.saved is None:  # what is decided from scores is quickly decided again
            write_facts(folder, facts)
        if dense is None:
            dense = _dense(trainer, method, data, folder)
        trainer.fit(method, data)
        pruned = measure_perplexity(
            trainer, data, Checkpoint.open(str(method.pruned_folder)), "pruned", method.slot, method.progress
        )
        method.seconds["total"] = time.perf_counter() - started

        record = _record(trainer, method, data, config, dense, pruned)
        if folder is not None:
            for logger in _tensorboards(trainer):
                options = {"method": method.label, "pruning_ratio": method.pruning_ratio}
                log_importance(logger.experiment, method.scores)
                logger.log_hyperparams(*hparams(options, record.metrics))
                logger.finalize("success")
            folder.append_to_card(evaluation_section(record.metrics))
            folder.write_results(record.calibration, record.environment, record.metrics)
        path = _path_on_every_rank(trainer, folder)
    return path, record


def _dense(
    trainer: L.Trainer, method: PruningMethod, data: CalibrationDataModule, folder: RunFolder | None
) -> dict[str, PerplexityResult]:
    """The dense model's perplexities, which a run that goes on may know already."""
    fingerprints = {item.name: item.manifest["fingerprint"] for item in data.evaluation}
    # Several processes measure again: they are only started, or joined, by the first fit or test, so that until then
    # one cannot tell the others what it knows.
    known = known_dense(folder, fingerprints) if folder is not None and trainer.world_size == 1 else None
    if known is not None:
        return {name: PerplexityResult(*pair) for name, pair in known.items()}
    method.expect_roughly(data)
    measured = measure_perplexity(trainer, data, method.checkpoint, "dense", method.slot, method.progress)
    if folder is not None and measured and method.saved is None:
        values = {name: (result.perplexity, result.tokens) for name, result in measured.items()}
        keep_dense(folder, fingerprints, values)
    return measured


def evaluate_and_record(
    trainer: L.Trainer, model: Evaluation, data: CalibrationDataModule, config: str
) -> tuple[Path, RunRecord]:
    """Measure the perplexity of one model with the protocol of the pruning runs and write it.

    Raises:
        UserError: a mistake in the input, or no evaluation set; nothing has been written then.
    """
    model.check_model()
    with claimed(trainer, "test", config) as folder, closing(model.progress):
        data.needs_calibration = False
        data.setup("test")
        if not data.evaluation:
            raise UserError(
                "--data.eval_datasets: nothing to evaluate on. Name at least one corpus, file or token array."
            )
        trainer.test(model, data, verbose=False)
        metrics = {
            "perplexity": {
                name: {"perplexity": result.perplexity, "tokens": result.tokens}
                for name, result in model.perplexity.items()
            },
            "evaluation": {item.name: item.manifest for item in data.evaluation},
            "parameters": sum(parameter.numel() for parameter in model.slot.model.net.parameters()),
            "seconds": {phase: round(value, 3) for phase, value in model.seconds.items()},
            "peak_memory_bytes": peak_memory_bytes(),
            "model": model.pretrained,
        }
        record = RunRecord(config, {}, environment(str(trainer.precision), trainer.strategy.root_device), metrics)
        if folder is not None:
            folder.write_evaluation(record.environment, record.metrics)
        path = _path_on_every_rank(trainer, folder)
    return path, record


@contextmanager
def claimed(
    trainer: L.Trainer, label: str, config: str, again: Path | None = None, events: str | None = None
) -> Iterator[RunFolder | None]:
    """The run's folder on rank 0, which alone writes; None on the others. TensorBoard's events go there too, into its
    folder ``events`` where one is given."""
    root = Path(trainer.default_root_dir)
    claim: AbstractContextManager[RunFolder | None] = nullcontext()
    if trainer.is_global_zero:
        claim = RunFolder.claim(root, label, again=again)
    with claim as folder, _writer_threads_fail_quietly():
        if folder is not None:
            folder.write_config(config)
        # Our own logger was made before the folder had its number; a logger of the user's stays where it is.
        version = folder.path.name if folder is not None else "not written on this rank"
        ours = TensorBoardLogger(root, name=label, version=version, sub_dir=events, default_hp_metric=False)
        trainer.loggers = [
            ours if isinstance(logger, TensorBoardLogger) and Path(logger.root_dir) == root / label else logger
            for logger in trainer.loggers
        ]
        try:
            yield folder
        except BaseException as error:  # after fit and test, too, where Lightning does not see it
            trainer.strategy.on_exception(error)
            raise
        finally:
            for logger in _tensorboards(trainer):  # its thread would write to a folder that is being removed
                if trainer.is_global_zero and Path(logger.log_dir).is_dir():
                    logger.experiment.close()


@contextmanager
def _writer_threads_fail_quietly() -> Iterator[None]:
    """TensorBoard's thread dies with a traceback when the disk is full; the main thread notices and says it better."""
    before = threading.excepthook

    def hook(found: threading.ExceptHookArgs) -> None:
        if not (isinstance(found.exc_value, OSError) and found.exc_value.errno in FULL):
            before(found)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _tensorboards(trainer: L.Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _path_on_every_rank(trainer: L.Trainer, folder: RunFolder | None) -> Path:
    return Path(trainer.strategy.broadcast("" if folder is None else str(folder.path)))


def _record(
    trainer: L.Trainer,
    method: PruningMethod,
    data: CalibrationDataModule,
    config: str,
    dense: dict[str, PerplexityResult],
    pruned: dict[str, PerplexityResult],
) -> RunRecord:
    evaluation = {
        item.name: {**item.manifest, "unigram_perplexity": unigram_perplexity(item.tokens)} for item in data.evaluation
    }
    calibration = method.calibration_facts() or {"dataset": None, "note": "this method reads no data"}
    weights = method.checkpoint.fingerprint
    metrics = run_metrics(method.plan, dense, pruned, evaluation, method.seconds, peak_memory_bytes())
    metrics["method"] = {
        "name": method.method,
        "label": method.label,
        "base_model": method.pretrained,
        "base_model_sha256": weights,
        "scores_reused": method.saved is not None,
        "measured_seconds": method.saved.seconds if method.saved is not None else {},
    }
    metrics["self_check"] = method.self_check
    metrics["configuration_sha256"] = configuration_sha256(
        type(method).__name__,
        yaml.safe_load(config)["model"]["init_args"],
        str(trainer.precision),
        weights,
        calibration.get("fingerprint"),
        {name: manifest["fingerprint"] for name, manifest in evaluation.items()},
    )
    facts = environment(str(trainer.precision), trainer.strategy.root_device)
    return RunRecord(config, calibration, facts, metrics)
