"""One run, start to end: dense perplexity → calibrate and prune → pruned perplexity → record."""

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_prune.checkpoint.base_facts import history
from lightning_prune.checkpoint.cut import unpruned
from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.checkpoint.serving_notes import pattern_note, tensor_parallel_sizes
from lightning_prune.checkpoint.whole import bytes_beside
from lightning_prune.data.calibration import EvaluationSet
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.evaluation.continuations import Continuations, common_beginning, examples
from lightning_prune.evaluation.perplexity import (
    Evaluation,
    Measured,
    evaluation_phase,
    evaluation_work,
    measure,
    unigram_perplexity,
)
from lightning_prune.methods.base import PruningMethod
from lightning_prune.methods.target import footprint
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.runs.environment import environment, peak_memory_bytes
from lightning_prune.runs.folder import NO_DATA, STARTED, RunFolder, check_label
from lightning_prune.runs.memory_estimate import Memory, place
from lightning_prune.runs.resume import configuration_sha256, facts_of, unfinished_run
from lightning_prune.runs.tensorboard import close_loggers, log_result, open_loggers
from lightning_prune.runs.verdict import evaluation_section
from lightning_prune.support.errors import UserError, first_line
from lightning_prune.support.files import FULL, write_json


def prune_and_record(
    trainer: L.Trainer,
    method: PruningMethod,
    data: CalibrationDataModule,
    config: str,
    shared: list[Measured] | None = None,
    resume: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Run one method and write a complete run folder; returns its path, and its ``metrics.json``.

    ``trainer`` is a fresh one, below whose ``default_root_dir`` the folder is claimed, ``config`` the resolved
    configuration as YAML. ``shared`` holds what an earlier run measured of the dense model on the same sets, or takes
    it from this one; it stays open. ``resume`` continues the unfinished run of the same configuration.

    Raises:
        UserError: a mistake in the input, or a device that is too small; nothing has been written then. Or the disk is
            full.
        FloatingPointError: NaN or infinite values; says where, and what would help.
    """
    started = time.perf_counter()
    check_label(method.label)
    method.check_model()
    data.needs_calibration = method.needs_calibration
    data.take_model(method.checkpoint.limits[1])
    with method.seconds.measure("tokenise"):
        data.setup("fit")
    place(trainer, method, data)
    calibration = data.calibration.manifest.fingerprint if method.needs_calibration else None
    facts = facts_of(yaml.safe_load(config), method.checkpoint.fingerprint, calibration, trainer.world_size)
    again = None
    if resume and trainer.is_global_zero:
        again = unfinished_run(Path(trainer.default_root_dir), method.label, facts)
    ratio = method.requested_ratio
    events = None if ratio is None else f"{100 * ratio:.4g}%"  # TensorBoard shows a run under the path to its events
    with (
        claimed(trainer, method.label, config, again, events) as folder,
        _advice_on_failure(method, data),
        closing(method.progress),
    ):
        method.run_folder = folder
        work = evaluation_work(data, len(method.layers)) * (1 - method.pruning_ratio)
        method.progress.expect(evaluation_phase("pruned"), work)
        if folder is not None and method.saved is None:  # what is decided from scores is quickly decided again
            write_json(folder.path / STARTED, facts)
        known = [] if shared is None else shared
        if not known:
            method.expect_roughly(data)
            scratch = scratch_folder(folder)
            known.append(measure(trainer, data, method.checkpoint, "dense", method.slot, method.progress, scratch))
        (dense,) = known
        trainer.fit(method, data)
        made = Checkpoint.open(str(method.pruned_folder))
        pruned = measure(trainer, data, made, "pruned", method.slot, method.progress, reference=dense)
        if shared is None:
            dense.close()
        method.seconds["total"] = time.perf_counter() - started
        metrics = _metrics(trainer, method, data, config, dense, pruned)
        if folder is not None:
            _write(folder, trainer, method, metrics)
        path = trainer.strategy.broadcast("" if folder is None else str(folder.path))
    return Path(path), metrics


def _write(folder: RunFolder, trainer: L.Trainer, method: PruningMethod, metrics: dict[str, Any]) -> None:
    """Log and write the records of a finished run."""
    log_result(trainer, {"method": method.label, "pruning_ratio": method.pruning_ratio}, metrics, method.scores)
    folder.append_to_card(evaluation_section(metrics))
    surroundings = environment(str(trainer.precision), trainer.strategy.root_device)
    folder.write_results(method.calibration_facts() or NO_DATA, surroundings, metrics)


def scratch_folder(folder: RunFolder | None) -> Path:
    """The folder for residual streams that do not fit into memory."""
    return Path(tempfile.gettempdir()) if folder is None else folder.path


def evaluate_and_record(
    trainer: L.Trainer, model: Evaluation, data: CalibrationDataModule, config: str, dense: str = ""
) -> tuple[Path, dict[str, Any]]:
    """Measure the perplexity of one model with the protocol of the pruning runs, with ``dense`` also its distance from
    that one, and write it; the run folder, and its ``metrics.json``. After a UserError nothing has been written."""
    model.check_model()
    reference = model.check_dense(dense) if dense else None
    with claimed(trainer, "test", config) as folder, closing(model.progress):
        data.needs_calibration = False
        positions = [one.limits[1] for one in (model.checkpoint, reference) if one is not None]
        data.take_model(min(filter(None, positions), default=None))
        data.setup("test")
        if not data.evaluation:
            raise UserError(
                "--data.eval_datasets: nothing to evaluate on. Name at least one corpus, file or token array."
            )
        if reference is not None:
            scratch = scratch_folder(folder)
            model.reference = measure(trainer, data, reference, "dense", model.slot, model.progress, scratch)
        trainer.test(model, data, verbose=False)
        metrics = {
            "perplexity": {name: asdict(result) for name, result in model.perplexity.items()},
            "evaluation": {item.name: item.manifest for item in data.evaluation},
            "parameters": sum(parameter.numel() for parameter in model.slot.model.net.parameters()),
            "seconds": {phase: round(value, 3) for phase, value in model.seconds.items()},
            "peak_memory_bytes": peak_memory_bytes(),
            "model": model.pretrained,
        }
        if model.reference is not None:
            for name, result in model.reference.perplexity.items():
                metrics["perplexity"][name]["dense"] = result.perplexity
            metrics |= {"dense": dense, **compared(model.reference, model.measured, data.evaluation)}
            model.reference.close()
        if folder is not None:
            log_result(trainer, {"model": model.pretrained}, metrics)
            folder.write_results({}, environment(str(trainer.precision), trainer.strategy.root_device), metrics)
        path = trainer.strategy.broadcast("" if folder is None else str(folder.path))
    return Path(path), metrics


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
        open_loggers(trainer)
        try:
            yield folder
        except BaseException as error:  # after fit and test, too, where Lightning does not see it
            trainer.strategy.on_exception(error)
            raise
        finally:
            close_loggers(trainer)


@contextmanager
def _advice_on_failure(method: PruningMethod, data: CalibrationDataModule) -> Iterator[None]:
    """Complete the message of numerical trouble, and make a UserError of memory that does not suffice, with what would
    help."""
    try:
        yield
    except FloatingPointError as error:
        precision = str(method.trainer.precision)
        others = {"16": "bf16-true or 32-true", "bf": "32-true"}.get(precision[:2])
        if bad := _bad_weight(method.checkpoint):
            remedy = f"The weights of '{method.pretrained}' themselves hold NaN or infinite values, first in {bad}: "
            remedy += "give others."
        elif others is not None:
            remedy = f"Use --trainer.precision {others}."
        else:
            remedy = f"Precision {precision} is in use already, so the values lie outside its range: look at the model "
            remedy += "and the text."
        raise FloatingPointError(f"{error} {remedy}") from error
    except (MemoryError, RuntimeError) as error:
        # On the host torch raises a plain RuntimeError.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        remedy = Memory(method.trainer, method, data).advice()
        raise UserError(f"Out of memory: {first_line(error)[:200]} {remedy}") from error


def _bad_weight(checkpoint: Checkpoint) -> str | None:
    """The first parameter of the checkpoint that is not finite."""
    with closing(checkpoint.source()) as source:
        for name in source.entries:
            if not bool(torch.isfinite(source.read([name], None, torch.device("cpu"))[name]).all()):
                return name
    return None


@contextmanager
def _writer_threads_fail_quietly() -> Iterator[None]:
    """TensorBoard's thread dies with a traceback when the disk is full; the main thread notices and says it better."""
    before = threading.excepthook

    def hook(raised: threading.ExceptHookArgs) -> None:
        if not (isinstance(raised.exc_value, OSError) and raised.exc_value.errno in FULL):
            before(raised)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _metrics(
    trainer: L.Trainer,
    method: PruningMethod,
    data: CalibrationDataModule,
    config: str,
    dense: Measured,
    pruned: Measured,
) -> dict[str, Any]:
    weights = method.checkpoint.fingerprint
    metrics = run_metrics(method.plan, dense, pruned, data.evaluation, method.seconds)
    metrics["method"] = {
        "name": method.method,
        "label": method.label,
        "base_model": method.pretrained,
        "base_model_sha256": weights,
        "history": history(method.checkpoint.path),
        "scores_reused": method.saved is not None,
        "measured_seconds": method.saved.seconds if method.saved is not None else {},
    }
    metrics["footprint"] = _footprint(method, pruned.checkpoint)
    if (target := method.target) is not None:
        left, kept, size = method.plan.parameters["pruned"], method.plan.layers, method.written_dtype.itemsize
        target = replace(target, beside=bytes_beside(pruned.checkpoint))  # 0 where the text model alone was written
        reached = target.size(left, method.layers, kept, method.checkpoint.config, size)
        metrics["target"] = asdict(target) | {"reached": reached}
    metrics["self_check"] = method.self_check
    written = pruned.checkpoint.config
    metrics["serving"] = {"tensor_parallel": tensor_parallel_sizes(written, method.plan), "note": pattern_note(written)}
    metrics["configuration_sha256"] = configuration_sha256(
        type(method).__name__,
        yaml.safe_load(config)["model"]["init_args"],
        str(trainer.precision),
        weights,
        (method.calibration_facts() or NO_DATA).get("fingerprint"),
        data.fingerprints,
    )
    return metrics


def _footprint(method: PruningMethod, pruned: Checkpoint) -> dict[str, Any]:
    """Footprints of the dense and the pruned model, both of the text model alone or of the whole, as it was written."""
    dense, layers, sizes = method.checkpoint, method.layers, method.plan.parameters
    beside = bytes_beside(pruned)
    sides = {}
    for side, checkpoint, kept, dtype in (
        ("dense", dense, unpruned(layers), dense.stored_dtype),
        ("pruned", pruned, method.plan.layers, method.written_dtype),
    ):
        counts = sizes[side], sizes.get(f"{side}_active", sizes[side])
        files = sum(path.stat().st_size for path in checkpoint.weight_files)
        sides[side] = {"file_bytes": files, **footprint(layers, dense.config, kept, counts, dtype.itemsize, beside)}
    return sides


def run_metrics(
    plan: PruningPlan, dense: Measured, pruned: Measured, sets: Sequence[EvaluationSet], seconds: dict[str, float]
) -> dict[str, Any]:
    """The contents of ``metrics.json``; ``seconds`` are by phase."""
    vocab_size = dense.checkpoint.limits[0]
    return {
        "perplexity": {
            name: {"dense": one.perplexity, "pruned": pruned.perplexity[name].perplexity, "tokens": one.tokens}
            for name, one in dense.perplexity.items()
        },
        **compared(dense, pruned, sets),
        "evaluation": {
            item.name: {**item.manifest, "unigram_perplexity": unigram_perplexity(item.tokens, vocab_size)}
            for item in sets
        },
        "parameters": plan.parameters,
        "pruning_ratio": {"requested": plan.pruning_ratio, "achieved": plan.achieved_ratio},
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
    }


def compared(dense: Measured, pruned: Measured, sets: Sequence[EvaluationSet]) -> dict[str, Any]:
    """Distance and continuations as ``metrics.json`` has them."""
    facts: dict[str, Any] = {"distance": {name: asdict(one) for name, one in pruned.distance.items()}}
    if dense.written is None or pruned.written is None:
        return facts
    count = min(dense.written.new_tokens, pruned.written.new_tokens)
    both: dict[str, Continuations] = {"dense": dense.written.first(count), "pruned": pruned.written.first(count)}
    number, length = dense.written.prompts.shape
    facts["continuations"] = {
        "evaluation_set": sets[0].name,
        "prompts": number,
        "prompt_tokens": length,
        "new_tokens": count,
        "common_beginning": common_beginning(both["dense"], both["pruned"]),
        **{side: {"repeated_4grams": one.repeated, "ended": one.ended} for side, one in both.items()},
        "examples": examples(both["dense"], both["pruned"], dense.checkpoint.tokenizer),
    }
    return facts
