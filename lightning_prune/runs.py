"""One run, start to end: dense perplexity → calibrate and prune → pruned perplexity → record."""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.errors import UserError
from lightning_prune.evaluation.module import EvaluatedModel, PerplexityResult
from lightning_prune.evaluation.unigram import unigram_perplexity
from lightning_prune.files import write_text
from lightning_prune.methods.base import PruningMethod
from lightning_prune.reporting.base_model import base_model_sha256
from lightning_prune.reporting.configuration import configuration_sha256
from lightning_prune.reporting.environment import environment, peak_memory_bytes
from lightning_prune.reporting.run_record import RunRecord, run_metrics
from lightning_prune.reporting.tensorboard import hparams, log_importance
from lightning_prune.reporting.verdict import evaluation_section


def prune_and_record(
    trainer: L.Trainer,
    method: PruningMethod,
    data: CalibrationDataModule,
    config: str,
    dense: dict[str, PerplexityResult] | None = None,
) -> tuple[Path, RunRecord]:
    """Run one method and leave a complete run folder.

    Args:
        trainer: a fresh trainer; its TensorBoard logger names the run folder.
        method: what to run.
        data: calibration and evaluation sets.
        config: the resolved configuration as YAML, for ``config.yaml``.
        dense: perplexities of the dense model where they are known already.

    Returns:
        The run folder and its record.

    Raises:
        UserError: a mistake in the input; nothing has been written then. Or the disk is full.
    """
    started = time.perf_counter()
    method.run_folder = folder = run_folder(trainer, method.label)
    check_writable(folder)
    with tidy(trainer, folder):
        data.needs_calibration = method.needs_calibration
        with method.timed("tokenise"):
            data.setup("fit")
        if dense is None:
            trainer.test(method, data, verbose=False)
            dense = method.perplexity
            method.seconds["evaluate dense"] = method.seconds.pop("evaluate", 0.0)
        trainer.fit(method, data)
        trainer.test(method, data, verbose=False)
        method.seconds["evaluate pruned"] = method.seconds.pop("evaluate", 0.0)
        method.seconds["total"] = time.perf_counter() - started

        evaluation = {
            item.name: {**item.manifest, "unigram_perplexity": unigram_perplexity(item.tokens)}
            for item in data.evaluation
        }
        metrics = run_metrics(method.plan, dense, method.perplexity, evaluation, method.seconds, peak_memory_bytes())
        metrics["method"] = {
            "name": method.method,
            "label": method.label,
            "base_model": method.pretrained,
            "base_model_sha256": base_model_sha256(method.pretrained),
            "scores_reused": method.saved is not None,
        }
        calibration = method.calibration_facts() or {"dataset": None, "note": "this method reads no data"}
        metrics["configuration_sha256"] = configuration_sha256(
            type(method).__name__,
            yaml.safe_load(config)["model"]["init_args"],
            str(trainer.precision),
            metrics["method"]["base_model_sha256"] or method.pretrained,
            calibration.get("fingerprint"),
            {name: manifest["fingerprint"] for name, manifest in evaluation.items()},
        )
        record = RunRecord(
            config, calibration, environment(str(trainer.precision), trainer.strategy.root_device), metrics
        )
        metrics["self_check"] = method.self_check
        if trainer.is_global_zero:
            _log(trainer, method, metrics)
            card = folder / "pruned" / "README.md"
            write_text(card, card.read_text(encoding="utf-8") + evaluation_section(metrics))
            record.save(folder)
    return folder, record


def evaluate_and_record(
    trainer: L.Trainer, model: EvaluatedModel, data: CalibrationDataModule, config: str
) -> tuple[Path, RunRecord]:
    """Measure the perplexity of one model with the protocol of the pruning runs and write it.

    Raises:
        UserError: a mistake in the input, or no evaluation set; nothing has been written then.
    """
    folder = run_folder(trainer, "test")
    check_writable(folder)
    with tidy(trainer, folder):
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
            "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
            "seconds": {phase: round(value, 3) for phase, value in model.seconds.items()},
            "peak_memory_bytes": peak_memory_bytes(),
            "model": model.pretrained,
        }
        record = RunRecord(config, {}, environment(str(trainer.precision), trainer.strategy.root_device), metrics)
        if trainer.is_global_zero:
            record.save(folder)
    return folder, record


def run_folder(trainer: L.Trainer, label: str) -> Path:
    """``<root>/<label>/version_N``: TensorBoard's folder where that logger is on, the next free N otherwise."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            return Path(logger.log_dir)
    parent = Path(trainer.default_root_dir) / label
    taken = [int(path.name.removeprefix("version_")) for path in parent.glob("version_*") if path.name[8:].isdigit()]
    return parent / f"version_{max(taken, default=-1) + 1}"


def check_writable(folder: Path, option: str = "--trainer.default_root_dir") -> None:
    """Try the nearest existing parent of ``folder``; ``option`` is the one that chose it.

    Raises:
        UserError: nothing can be written there.
    """
    parent = folder.absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        handle, name = tempfile.mkstemp(dir=parent, prefix=".writable.")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise UserError(
            f"{option}: cannot write below '{parent}' ({error.strerror}). Choose a writable folder."
        ) from None


@contextmanager
def tidy(trainer: L.Trainer, folder: Path) -> Iterator[None]:
    """Whatever ends a run early, an interrupt too: no folder stays that holds TensorBoard's files alone.

    What is complete (scores, plan, a checkpoint) stays.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    there_before = next(parent for parent in folder.absolute().parents if parent.exists())
    try:
        yield
    except BaseException as error:
        if trainer.is_global_zero and folder.is_dir():
            _remove_if_empty(trainer, folder.absolute(), there_before)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise UserError(
                f"cannot write below '{folder}' ({error.strerror}). Free space there, or choose another folder with "
                "--trainer.default_root_dir."
            ) from error
        raise


def _remove_if_empty(trainer: L.Trainer, folder: Path, there_before: Path) -> None:
    own = [path for path in folder.iterdir() if "tfevents" not in path.name and path.name != "hparams.yaml"]
    if own:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.close()  # its thread would write to the removed file
    shutil.rmtree(folder)
    for parent in folder.parents:
        if parent == there_before or any(parent.iterdir()):
            break
        parent.rmdir()


def _log(trainer: L.Trainer, method: PruningMethod, metrics: dict[str, object]) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            options, results = hparams({"method": method.label, "pruning_ratio": method.pruning_ratio}, metrics)
            log_importance(logger.experiment, method.scores)
            logger.log_hyperparams(options, results)
            logger.finalize("success")
