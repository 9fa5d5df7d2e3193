"""One recovery: a finished run's pruned model → trained → a run folder beside that run's."""

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_prune.checkpoint.cut import layout_of
from lightning_prune.checkpoint.model_card import model_card
from lightning_prune.evaluation.perplexity import PerplexityResult, measure_perplexity, unigram_perplexity
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.model_slot import ModelSlot
from lightning_prune.recovery import Recovery, RecoveryDataModule
from lightning_prune.recovery.train import train
from lightning_prune.recovery.write import write_recovered
from lightning_prune.runs.environment import environment, peak_memory_bytes
from lightning_prune.runs.folder import FinishedRun, RunFolder
from lightning_prune.runs.records import as_dict
from lightning_prune.runs.recovered import card_section
from lightning_prune.runs.resume import Facts, unfinished_run, write_facts
from lightning_prune.runs.reuse import known_perplexities
from lightning_prune.runs.run import claimed
from lightning_prune.runs.summary import RunRecord, run_metrics
from lightning_prune.runs.tensorboard import hparams
from lightning_prune.runs.verdict import evaluation_section
from lightning_prune.support.errors import UserError
from lightning_prune.support.names import PRUNED, TRAINING
from lightning_prune.support.quiet import quiet_transformers
from lightning_prune.support.timing import Seconds

OPTION = "--model.pretrained"
FREE = ("label", "pretrained", "cache_dir", "eval_datasets", "eval_batch_size", "tokenizer")  # decide no weight
DECISIVE = ("precision", "max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val")


def parent_run(pretrained: str) -> FinishedRun:
    """The finished run whose ``pruned`` folder this is.

    Raises:
        UserError: it is not the checkpoint of a finished run.
    """
    folder = Path(pretrained).expanduser().absolute()
    if not pretrained or folder.name != PRUNED:
        raise UserError(
            f"{OPTION}: found '{pretrained}'; give the pruned folder of a finished run, such as "
            "logs/wanda/version_0/pruned."
        )
    return RunFolder.open(folder.parent, OPTION)


def recover_and_record(
    trainer: L.Trainer,
    module: Recovery,
    data: RecoveryDataModule,
    run: FinishedRun,
    config: str,
    resume: bool = False,
) -> tuple[Path, RunRecord]:
    """Train what ``run`` left and leave a complete run folder of the same kind.

    Args:
        trainer: a fresh trainer; the run folder is claimed below its ``default_root_dir``.
        module: what to train and how.
        data: text to train on.
        run: the run that pruned.
        config: the resolved configuration as YAML, for ``config.yaml``.
        resume: go on with the unfinished run of the same configuration, at its last saved state.

    Returns:
        The run folder and its record.

    Raises:
        UserError: a mistake in the input; nothing has been written then. Or the disk is full.
        FloatingPointError: the loss is not finite.
        CheckpointError: the self-check failed, or a zeroed weight is not zero any more.
    """
    started = time.perf_counter()
    _follow(run, data)
    with module.seconds.measure("tokenise"):
        data.setup("fit")
    data.check_against_model(*module.checkpoint.limits)
    base = run.metrics.method.base_model_sha256
    module.open(str(trainer.precision), run.plan.base_model, base, masked=bool(run.details.zeroed_weights))
    facts = _facts(module, data, config)
    again = unfinished_run(Path(trainer.default_root_dir), module.label, facts) if resume else None
    with claimed(trainer, module.label, config, again) as folder, closing(module.progress), quiet_transformers():
        assert folder is not None  # one process
        write_facts(folder, facts)
        dense = _perplexity(run, data, module, trainer, "dense")
        pruned = _perplexity(run, data, module, trainer, "pruned")
        trained = train(trainer, module, data, folder.path / TRAINING)
        with module.seconds.measure("save"):
            self_check, zeroed = _save(folder, module, run)
        after = _measure(Checkpoint.open(str(folder.pruned)), "recovered", run, data, module, trainer)
        record = {
            "parent": str(run.path),
            "parent_label": run.metrics.method.label,
            **trained,
            "perplexity": {name: one.perplexity for name, one in pruned.items()},
            "zeroed_weights": zeroed,
        }
        module.seconds["total"] = time.perf_counter() - started
        metrics = _metrics(run, data, module, dense, after) | {"self_check": self_check}
        _log(trainer, module, record, metrics)
        folder.append_to_card(card_section(record, metrics) + evaluation_section(metrics))
        folder.write_recovery(record)
        calibration = (
            as_dict(run.calibration) if run.calibration else {"dataset": None, "note": "this method reads no data"}
        )
        # The precision that perplexity was measured in, which is the pruning run's; recovery.json has the training's.
        surroundings = environment(run.environment.precision, trainer.strategy.root_device)
        folder.write_results(calibration, surroundings, metrics)
    return folder.path, RunRecord(config, calibration, surroundings, metrics | {"recovery": record})


def _follow(run: FinishedRun, data: RecoveryDataModule) -> None:
    """Let ``data`` take what its options leave open from the run that pruned."""

    def spec(text: Any) -> str:
        return str(text.dataset if text.split == "all" else f"{text.dataset}:{text.split}")

    default = "demo" if Path(run.plan.base_model).name == "demo" else "wikitext2"
    sets = run.metrics.evaluation.values()
    lengths = {item.seq_len for item in sets}  # token arrays, taken whole, may have several
    data.follow(
        spec(run.calibration) if run.calibration else default,
        [spec(item) for item in sets],
        lengths.pop() if len(lengths) == 1 else None,
    )


def _facts(module: Recovery, data: RecoveryDataModule, config: str) -> Facts:
    """What an unfinished run must share with this one."""
    parsed = yaml.safe_load(config)
    options = {
        f"{group}.{name}": value
        for group in ("model", "data", "trainer")
        for name, value in parsed[group].items()
        if (name in DECISIVE if group == "trainer" else name not in FREE)
    }
    weights, tokens = module.checkpoint.fingerprint, data.manifest["fingerprint"]
    return {**options, "weights of the model (SHA-256)": weights, "training tokens (SHA-256)": tokens}


def _perplexity(
    run: FinishedRun,
    data: RecoveryDataModule,
    module: Recovery,
    trainer: L.Trainer,
    which: Literal["dense", "pruned"],
) -> dict[str, PerplexityResult]:
    """What the pruning run measured, unless other sets are to be reported on."""
    known = known_perplexities(run, data, which)
    if known is not None:
        return known
    opened = Checkpoint.open(run.plan.base_model) if which == "dense" else module.checkpoint
    return _measure(opened, which, run, data, module, trainer)


def _measure(
    model: Checkpoint, which: str, run: FinishedRun, data: RecoveryDataModule, module: Recovery, trainer: L.Trainer
) -> dict[str, PerplexityResult]:
    """Perplexity in the precision of the pruning run."""
    device, precision = trainer.strategy.root_device, run.environment.precision
    if not data.evaluation:
        module.seconds.add("evaluate pruned", 0.0)
        return {}
    measuring = L.Trainer(
        accelerator="cpu" if device.type == "cpu" else "auto",
        devices=1 if device.index is None else [device.index],
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    slot = ModelSlot("auto", Seconds())
    measured = measure_perplexity(measuring, data, model, which, slot, module.progress)
    slot.close()
    module.seconds.add("evaluate pruned", slot.seconds[f"evaluate {which}"])
    return measured


def _save(folder: RunFolder, module: Recovery, run: FinishedRun) -> tuple[dict[str, Any], int | None]:
    """Write scores, plan and checkpoint; what the self-check compared, and the number of zeroed weights."""
    state, zeroed = module.merged()
    plan = replace(run.plan, weights_updated=True)
    origin = {"label": module.label, "measured_by": run.details.measured_by or str(run.path)}
    folder.write_decision(run.scores, plan, as_dict(run.details) | origin)
    calibration = as_dict(run.calibration) if run.calibration else None
    card = model_card(plan, layout_of(module.checkpoint.config), calibration)
    return write_recovered(state, module.checkpoint, folder.pruned, card), zeroed


def _metrics(
    run: FinishedRun,
    data: RecoveryDataModule,
    module: Recovery,
    dense: dict[str, PerplexityResult],
    recovered: dict[str, PerplexityResult],
) -> dict[str, Any]:
    manifests = {
        item.name: {**item.manifest, "unigram_perplexity": unigram_perplexity(item.tokens)} for item in data.evaluation
    }
    metrics = run_metrics(run.plan, dense, recovered, manifests, module.seconds, peak_memory_bytes())
    method, spent = as_dict(run.metrics.method), run.metrics.method.measured_seconds | run.metrics.seconds
    changed = {"label": module.label, "scores_reused": True, "measured_seconds": spent}
    return metrics | {"method": method | changed}


def _log(trainer: L.Trainer, module: Recovery, record: dict[str, Any], metrics: dict[str, Any]) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            rates = {"learning_rate": module.learning_rate, "distillation": module.distillation}
            options, results = hparams({"method": module.label, **rates, "tokens_seen": module.tokens_seen}, metrics)
            results["hparams/held-out loss"] = record["held_out_loss"]["after"]
            logger.log_hyperparams(options, results)
            logger.finalize("success")
