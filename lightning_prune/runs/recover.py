"""One recovery: a finished run's pruned model → trained → a run folder beside that run's."""

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_prune.calibration.module import DTYPES, LayeredModule, PerplexityResult
from lightning_prune.checkpoint.cut import layout_of
from lightning_prune.checkpoint.model_card import model_card
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.evaluation.unigram import unigram_perplexity
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.recovery.data import RecoveryDataModule, default_dataset
from lightning_prune.recovery.module import HELD_OUT, LAST, Recovery
from lightning_prune.recovery.schedule import timer_of
from lightning_prune.recovery.write import write_recovered
from lightning_prune.runs.environment import environment, peak_memory_bytes
from lightning_prune.runs.folder import FinishedRun, RunFolder
from lightning_prune.runs.records import as_dict
from lightning_prune.runs.resume import Facts, unfinished_run, write_facts
from lightning_prune.runs.reuse import known_perplexities
from lightning_prune.runs.run import claimed
from lightning_prune.runs.summary import RunRecord, run_metrics
from lightning_prune.runs.verdict import evaluation_section
from lightning_prune.support.errors import UserError
from lightning_prune.support.escape import markdown, markdown_table, plain, public_name
from lightning_prune.support.quiet import quiet_transformers

OPTION = "--model.pretrained"
FREE = ("model.label", "model.pretrained", "data.cache_dir", "data.eval_datasets", "data.tokenizer")


def parent_run(pretrained: str) -> FinishedRun:
    """The finished run whose ``pruned`` folder this is.

    Raises:
        UserError: it is not the checkpoint of a finished run.
    """
    hint = "Give the pruned folder of a finished run, such as logs/wanda/version_0/pruned."
    if not pretrained:
        raise UserError(f"{OPTION}: nothing is given. {hint}")
    folder = Path(pretrained).expanduser()
    run = RunFolder(folder.absolute().parent, OPTION)
    if not run.is_pruning_run or folder.absolute() != run.pruned:
        if RunFolder(folder.absolute(), OPTION).is_pruning_run:
            hint = f"Give '{folder / 'pruned'}'."
        raise UserError(
            f"{OPTION}: '{pretrained}' is not the pruned folder of a finished run, which says what was pruned, from "
            f"which dense model, and how good both are. {hint}"
        )
    return RunFolder.open(run.path, OPTION)


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
    evaluation = _evaluation_data(run, data)
    if data.dataset is None:
        calibration = None if run.calibration is None else run.calibration
        spec = None if calibration is None else _spec(calibration.dataset, calibration.split)
        data.dataset = default_dataset(spec, run.plan.base_model)
    with module.timed("tokenise"):
        data.setup("fit")
        evaluation.setup("test")
    data.refuse_evaluation_text(evaluation.evaluation)
    net: Any = module.checkpoint.config
    data.check_against_model(net.vocab_size, getattr(net, "max_position_embeddings", None))
    evaluation.check_against_model(net.vocab_size, getattr(net, "max_position_embeddings", None))
    _check_teacher(module, run)
    module.open(
        str(trainer.precision),
        run.plan.base_model,
        [layer.layer for layer in run.plan.layers if layer.kept_kv_heads or layer.kept_channels],
        masked=bool(run.details.zeroed_weights),
    )
    facts = _facts(module, data, config)
    again = unfinished_run(Path(trainer.default_root_dir), module.label, facts) if resume else None
    claim = claimed(trainer, module.label, config, again)
    with claim as folder, closing(module.progress), quiet_transformers():
        assert folder is not None  # one process
        module.folder = folder.path
        module.training_folder.mkdir(exist_ok=True)
        write_facts(folder, facts)
        dense, pruned = (_known_or_measured(run, evaluation, module, trainer, which) for which in ("dense", "pruned"))
        before, after, stopped_by = _train(trainer, module, data)
        measured = {
            "train": module.train_what,
            "teacher": (module.teacher or run.plan.base_model) if module.needs_teacher else None,
            "precision": str(trainer.precision),
            "trainable_parameters": module.trainable_parameters,
            "steps": trainer.global_step,
            "tokens_seen": module.tokens_seen,
            "seconds": round(module.seconds["train"], 3),
            "stopped_by": stopped_by,
            "held_out_loss": {"before": before, "after": after},
            "text": data.manifest,
        }
        plan = replace(run.plan, weights_updated=True)
        with module.timed("save"):
            state, zeroed = module.merged()
            details = as_dict(run.details) | {
                "label": module.label,
                "measured_by": run.details.measured_by or str(run.path),
            }
            folder.write_decision(run.scores, plan, details)
            facts_of_text = None if run.calibration is None else as_dict(run.calibration)
            card = model_card(plan, layout_of(net), facts_of_text)
            dtype = module.checkpoint.stored_dtype
            self_check = write_recovered(state, module.checkpoint, folder.pruned, dtype, card)
            del state
        recovered = _measure(str(folder.pruned), "recovered", evaluation, module, trainer, run)
        module.seconds["evaluate pruned"] = module.seconds.pop("evaluate recovered")
        module.seconds["total"] = time.perf_counter() - started
        record = {
            "parent": str(run.path),
            "parent_label": run.metrics.method.label,
            **measured,
            "perplexity": {name: one.perplexity for name, one in pruned.items()},
            "zeroed_weights": zeroed,
        }
        manifests = {
            item.name: {**item.manifest, "unigram_perplexity": unigram_perplexity(item.tokens)}
            for item in evaluation.evaluation
        }
        metrics = run_metrics(plan, dense, recovered, manifests, module.seconds, peak_memory_bytes())
        spent = run.metrics.method.measured_seconds | run.metrics.seconds
        metrics["method"] = as_dict(run.metrics.method) | {
            "label": module.label,
            "scores_reused": True,
            "measured_seconds": spent,
        }
        metrics["self_check"] = self_check
        _log(trainer, module, record, metrics)
        folder.append_to_card(_card_section(record, metrics) + evaluation_section(metrics))
        folder.write_recovery(record)
        facts_of_text = facts_of_text or {"dataset": None, "note": "this method reads no data"}
        # The precision that perplexity was measured in, which is the pruning run's; recovery.json has the training's.
        surroundings = environment(run.environment.precision, trainer.strategy.root_device)
        folder.write_results(facts_of_text, surroundings, metrics)
        path = folder.path
    return path, RunRecord(config, facts_of_text, surroundings, metrics | {"recovery": record})


def _train(trainer: L.Trainer, module: Recovery, data: RecoveryDataModule) -> tuple[float, float, str]:
    """Held-out loss before and after, and what ended training; the best state is in the module then."""
    trainer.validate(module, data, verbose=False)
    before = float(trainer.callback_metrics[HELD_OUT])
    last = module.training_folder / f"{LAST}.ckpt"
    _check_state(last)
    trainer.fit(module, data, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    module.progress.finish("training")
    module.seconds["train"] = module.seconds_trained
    stopped_by = _stopped_by(trainer)
    trainer.validate(module, data, verbose=False)  # steps may end a run between two measurements
    return before, module.take_best(float(trainer.callback_metrics[HELD_OUT])), stopped_by


def _check_state(last: Path) -> None:
    """A state that was cut off in writing ends in one sentence."""
    if not last.is_file():
        return
    try:
        torch.load(last, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch have no error in common
        raise UserError(
            f"--resume: the state in '{last}' cannot be read ({type(error).__name__}). Leave --resume out to begin "
            "anew."
        ) from None


def _stopped_by(trainer: L.Trainer) -> str:
    timer = timer_of(trainer)
    left = None if timer is None else timer.time_remaining()
    if left is not None and left <= 0:
        return "time"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.stopped_epoch > 0:
            return "held-out loss"
    return "steps" if 0 < trainer.max_steps <= trainer.global_step else "epochs"


def _evaluation_data(run: FinishedRun, data: RecoveryDataModule) -> CalibrationDataModule:
    """The evaluation sets of the pruning run, or those that were asked for in its window length."""
    try:
        parsed = yaml.safe_load(RunFolder.read_config(run.path, OPTION))
        options = dict(parsed["data"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise UserError(f"{OPTION}: '{run.path / 'config.yaml'}' does not hold the options of a run.") from None
    given = {name: options.get(name) for name in ("dataset", "eval_datasets", "eval_seq_len", "eval_batch_size")}
    if given["dataset"] is None and run.calibration is not None:
        given["dataset"] = run.calibration.dataset
    if data.eval_datasets is not None:
        given["eval_datasets"] = data.eval_datasets
    elif run.recovery is not None or given["eval_datasets"] is None:
        # Names alone say too little where they are a default, or the options are another command's.
        items = run.metrics.evaluation.values()
        given["eval_datasets"] = [_spec(item.dataset, item.split) for item in items]
        given["eval_seq_len"] = next((item.seq_len for item in items), None)
    known = {name: value for name, value in given.items() if value is not None}
    found = CalibrationDataModule(**known, cache_dir=str(data.cache_dir), tokenizer=data.tokenizer)
    found.needs_calibration = False
    return found


def _spec(dataset: str, split: str) -> str:
    """As an option would name it."""
    return dataset if split == "all" else f"{dataset}:{split}"


def _check_teacher(module: Recovery, run: FinishedRun) -> None:
    """The dense model must still be the one that was pruned."""
    recorded = run.metrics.method.base_model_sha256
    if not module.needs_teacher or module.teacher is not None or recorded is None:
        return
    try:
        found = Checkpoint.open(run.plan.base_model).fingerprint
    except UserError:
        found = None
    if found != recorded:
        raise UserError(
            f"--model.teacher: the dense model '{run.plan.base_model}' of '{run.path}' is not there any more, or has "
            "changed since (SHA-256). Say where it is, or train without it: --model.distillation 0."
        )


def _known_or_measured(
    run: FinishedRun, evaluation: CalibrationDataModule, module: Recovery, trainer: L.Trainer, which: Any
) -> dict[str, PerplexityResult]:
    known = known_perplexities(run, evaluation, which)
    if known is not None:
        return known
    folder = run.plan.base_model if which == "dense" else module.pretrained
    return _measure(folder, which, evaluation, module, trainer, run)


def _measure(
    folder: str,
    which: str,
    evaluation: CalibrationDataModule,
    module: Recovery,
    trainer: L.Trainer,
    run: FinishedRun,
) -> dict[str, PerplexityResult]:
    """Perplexity with the protocol and in the precision of the pruning run."""
    if not evaluation.evaluation:
        module.seconds.setdefault("evaluate recovered", 0.0)
        return {}
    precision: Any = run.environment.precision if run.environment.precision in DTYPES else "32-true"
    device = trainer.strategy.root_device
    measuring = L.Trainer(
        accelerator="cpu" if device.type == "cpu" else "auto",
        devices=1 if device.index is None else [device.index],
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    measured = LayeredModule(folder)
    measured.progress, measured.known_as = module.progress, which
    measuring.test(measured, evaluation, verbose=False)
    measured.close_model()
    phase = "evaluate recovered"
    module.seconds[phase] = module.seconds.get(phase, 0.0) + measured.seconds.get("evaluate", 0.0)
    return measured.perplexity


def _facts(module: Recovery, data: RecoveryDataModule, config: str) -> Facts:
    """What an unfinished run must share with this one."""
    parsed = yaml.safe_load(config)
    options = {f"{group}.{name}": value for group in ("model", "data") for name, value in parsed[group].items()}
    trainer = ("precision", "max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val")
    return {
        **{name: value for name, value in options.items() if name not in FREE},
        **{f"trainer.{name}": parsed["trainer"].get(name) for name in trainer},
        "weights of the model (SHA-256)": module.checkpoint.fingerprint,
        "training tokens (SHA-256)": data.manifest["fingerprint"],
    }


def _log(trainer: L.Trainer, module: Recovery, record: dict[str, Any], metrics: dict[str, Any]) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            results = {f"hparams/perplexity {plain(k)}": float(v["pruned"]) for k, v in metrics["perplexity"].items()}
            results["hparams/held-out loss"] = record["held_out_loss"]["after"]
            options = {
                "method": module.label,
                "learning_rate": module.learning_rate,
                "distillation": module.distillation,
                "tokens_seen": module.tokens_seen,
            }
            logger.log_hyperparams(options, results)
            logger.finalize("success")


def _card_section(record: dict[str, Any], metrics: dict[str, Any]) -> str:
    rows = [
        ("Trained", "low-rank adapters, merged" if record["train"] == "lora" else "all weights"),
        ("Text", markdown(public_name(record["text"]["dataset"]))),
        ("Teacher", "none" if record["teacher"] is None else markdown(public_name(record["teacher"]))),
        ("Tokens seen", f"{record['tokens_seen']:,}"),
        ("Seconds", f"{record['seconds']:,.0f}"),
        *(
            (f"Perplexity before, {markdown(public_name(name))}", "not finite" if value is None else f"{value:.3f}")
            for name, value in record["perplexity"].items()
        ),
    ]
    return "\n## Recovery\n\n" + markdown_table(("", ""), rows) + "\n"
