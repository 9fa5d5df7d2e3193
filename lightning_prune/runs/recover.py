"""One recovery: a finished run's pruned model → trained → a run folder beside that run's."""

import os
import time
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import yaml

from lightning_prune.checkpoint.cut import layout_of
from lightning_prune.checkpoint.model_card import model_card
from lightning_prune.evaluation.perplexity import Measured, PerplexityResult, measure
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.model_slot import ModelSlot
from lightning_prune.recovery import Recovery, RecoveryDataModule
from lightning_prune.recovery.train import train
from lightning_prune.recovery.weights import write_recovered
from lightning_prune.runs.environment import environment
from lightning_prune.runs.folder import NO_DATA, STARTED, FinishedRun, RunFolder
from lightning_prune.runs.records import as_dict
from lightning_prune.runs.resume import Facts, unfinished_run
from lightning_prune.runs.run import claimed, run_metrics
from lightning_prune.runs.tensorboard import log_result
from lightning_prune.runs.trainer import calibration_trainer
from lightning_prune.runs.verdict import card_section, evaluation_section
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import write_json
from lightning_prune.support.names import PRUNED, TRAINING
from lightning_prune.support.quiet import quiet_transformers
from lightning_prune.support.timing import Seconds

OPTION = "--model.pretrained"
# Decide no weight, or have a fingerprint. The batch size does decide: a step of the optimizer takes one.
FREE = (
    *("label", "pretrained", "cache_dir", "dataset", "tokenizer", "continuations"),
    *("eval_datasets", "eval_batch_size", "eval_long_seq_len"),
)
DECISIVE = ("precision", "max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val")


def parent_run(pretrained: str) -> FinishedRun:
    """The finished run whose ``pruned`` folder this is, else UserError."""
    folder = Path(pretrained).expanduser().absolute()
    if not pretrained or folder.name != PRUNED:
        raise UserError(
            f"{OPTION}: found '{pretrained}'; give the pruned folder of a finished run, such as "
            "logs/wanda/version_0/pruned."
        )
    return RunFolder.open(folder.parent, OPTION)


def recover_and_record(
    trainer: L.Trainer, module: Recovery, data: RecoveryDataModule, run: FinishedRun, config: str, resume: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Train what ``run`` pruned and write a complete run folder of the same kind; returns its path, and its
    ``metrics.json`` with the ``recovery.json`` under ``recovery``.

    ``trainer`` (a fresh one), ``config`` and ``resume`` as of ``prune_and_record``.

    Raises:
        UserError: a mistake in the input; nothing has been written then. Or the disk is full.
        FloatingPointError: the loss is not finite.
        CheckpointError: the self-check failed, or a zeroed weight is not zero any more.
    """
    started = time.perf_counter()
    _follow(run, data)
    data.take_model(module.checkpoint.limits[1])
    with module.seconds.measure("tokenise"):
        data.setup("fit")
    data.check_against_model(*module.checkpoint.limits)
    base = run.metrics.method.base_model_sha256
    module.open(str(trainer.precision), run.plan.base_model, base, masked=bool(run.details.zeroed_weights))
    facts = _facts(module, data, config)
    again = unfinished_run(Path(trainer.default_root_dir), module.label, facts) if resume else None
    with claimed(trainer, module.label, config, again) as folder, closing(module.progress), quiet_transformers():
        assert folder is not None  # one process
        write_json(folder.path / STARTED, facts)
        measuring = partial(_measure, run=run, data=data, module=module, trainer=trainer)
        # What the pruning run measured, unless other sets are to be reported on.
        known, pruned = (_known(run, data, which) for which in ("dense", "pruned"))
        if pruned is None:
            pruned = measuring(module.checkpoint, "pruned").perplexity
        base_model = _base_model(run) if known is not None else Checkpoint.open(run.plan.base_model)
        trained = train(trainer, module, data, folder.path / TRAINING)
        with module.seconds.measure("save"):
            self_check, zeroed = _save(folder, module, run)
        # After the training, which may need the memory that the residual streams take.
        dense = None if base_model is None else measuring(base_model, "dense", scratch=folder.path)
        recovered = measuring(Checkpoint.open(str(folder.pruned)), "recovered", reference=dense)
        dense = dense or Measured(recovered.checkpoint, known or {})
        dense.close()
        record = {
            "parent": str(run.path),
            "parent_label": run.metrics.method.label,
            **trained,
            "perplexity": {name: one.perplexity for name, one in pruned.items()},
            "zeroed_weights": zeroed,
        }
        module.seconds["total"] = time.perf_counter() - started
        _note_overlap(run, data)
        metrics = run_metrics(run.plan, dense, recovered, data.evaluation, module.seconds)
        spent = run.metrics.method.measured_seconds | run.metrics.seconds
        changed = {"label": module.label, "scores_reused": True, "measured_seconds": spent}
        metrics |= {"method": as_dict(run.metrics.method) | changed, "self_check": self_check}
        metrics |= {} if run.metrics.target is None else {"target": as_dict(run.metrics.target)}
        rates = {"learning_rate": module.learning_rate, "distillation": module.distillation}
        options = {"method": module.label, **rates, "tokens_seen": module.tokens_seen}
        log_result(trainer, options, metrics, more={"held-out loss": record["held_out_loss"]["after"]})
        folder.append_to_card(card_section(record, metrics) + evaluation_section(metrics))
        folder.write_recovery(record)
        # The precision that perplexity was measured in, which is the pruning run's; recovery.json has the training's.
        surroundings = environment(run.environment.precision, trainer.strategy.root_device)
        folder.write_results(run.calibration_facts or NO_DATA, surroundings, metrics)
    return folder.path, metrics | {"recovery": record}


def _note_overlap(run: FinishedRun, data: RecoveryDataModule) -> None:
    """Take over how much of an evaluation set ``run`` calibrated on: pruning may have seen what training has not."""
    for item in data.evaluation:
        of = run.metrics.evaluation.get(item.name)
        if of is not None and of.fingerprint == item.manifest["fingerprint"]:
            item.manifest["calibration_overlap"] = of.calibration_overlap


def _follow(run: FinishedRun, data: RecoveryDataModule) -> None:
    """Let ``data`` take the options that are not given from the run that pruned."""

    def spec(text: dict[str, Any]) -> str:
        return str(text["dataset"] if text["split"] == "all" else f"{text['dataset']}:{text['split']}")

    text: str | list[str] = "demo" if Path(run.plan.base_model).name == "demo" else "wikitext2"
    if facts := run.calibration_facts:
        text = [f"{spec(part)}:{part['share']}" for part in facts.get("parts") or ()] or spec(facts)
    options = _data_options(run)
    sets = [item for item in run.metrics.evaluation.values() if item.long_windows_of is None]
    lengths = {item.seq_len for item in sets}  # token arrays, taken whole, may have several
    data.follow(
        text,
        options.get("column"),
        [spec(as_dict(item)) for item in sets],
        lengths.pop() if len(lengths) == 1 else None,
        options["bos"],
        {name: options[name] for name in ("eval_long_seq_len", "continuations")},
    )


def _data_options(run: FinishedRun) -> dict[str, Any]:
    """The options of ``run`` on its text; what a recovered run left open, as it measured, with its parent's column."""
    own = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8")).get("data") or {}
    sets, written = run.metrics.evaluation.values(), run.metrics.continuations
    measured = {
        "bos": "always" if any(text.bos != "none" for text in (run.calibration, *sets) if text) else "never",
        "eval_long_seq_len": max((one.seq_len for one in sets if one.long_windows_of), default=0),
        "continuations": 0 if written is None else written.prompts,
    }
    if run.recovery is not None:  # its column is that of the training text
        own.pop("column", None)
        with suppress(UserError):  # it is not there any more
            own["column"] = _data_options(RunFolder.open(Path(run.recovery.parent), OPTION)).get("column")
    return measured | {name: value for name, value in own.items() if value is not None}


def _facts(module: Recovery, data: RecoveryDataModule, config: str) -> Facts:
    """Facts that an unfinished run must share with this one to be continued."""
    parsed = yaml.safe_load(config)
    options = {
        f"{group}.{name}": value
        for group in ("model", "data", "trainer")
        for name, value in parsed[group].items()
        if (name in DECISIVE if group == "trainer" else name not in FREE)
    }
    weights, tokens = module.checkpoint.fingerprint, data.manifest["fingerprint"]
    if module.teacher and os.path.isdir(Path(module.teacher).expanduser()):  # however it is spelled
        options["model.teacher"] = os.path.realpath(Path(module.teacher).expanduser())
    return {**options, "weights of the model (SHA-256)": weights, "training tokens (SHA-256)": tokens}


def _known(run: FinishedRun, data: RecoveryDataModule, which: str) -> dict[str, PerplexityResult] | None:
    """Perplexities of the ``dense`` or the ``pruned`` model, if ``run`` measured all of exactly these sets."""
    sets = {name: item.fingerprint for name, item in run.metrics.evaluation.items()}
    values = {name: getattr(item, which) for name, item in run.metrics.perplexity.items()}
    if sets != {item.name: item.manifest["fingerprint"] for item in data.evaluation} or None in values.values():
        return None
    return {name: PerplexityResult(value, run.metrics.perplexity[name].tokens) for name, value in values.items()}


def _base_model(run: FinishedRun) -> Checkpoint | None:
    """The model that ``run`` pruned; None where it is not there any more, or another one is."""
    try:
        dense = Checkpoint.open(run.plan.base_model)
    except UserError:
        return None
    return dense if run.metrics.method.base_model_sha256 in (None, dense.fingerprint) else None


def _measure(
    model: Checkpoint,
    which: str,
    run: FinishedRun,
    data: RecoveryDataModule,
    module: Recovery,
    trainer: L.Trainer,
    **compare: Any,
) -> Measured:
    """``measure`` in the precision of the pruning run."""
    device, precision = trainer.strategy.root_device, run.environment.precision
    if not data.evaluation:
        module.seconds.add("evaluate pruned", 0.0)
        return Measured(model)
    accelerator, devices = "cpu" if device.type == "cpu" else "auto", 1 if device.index is None else [device.index]
    measuring = calibration_trainer(accelerator, devices, precision=precision, logger=False)  # type: ignore[arg-type]
    slot = ModelSlot("auto", Seconds())
    measured = measure(measuring, data, model, which, slot, module.progress, **compare)
    slot.close()
    module.seconds.add(f"evaluate {'dense' if which == 'dense' else 'pruned'}", slot.seconds[f"evaluate {which}"])
    return measured


def _save(folder: RunFolder, module: Recovery, run: FinishedRun) -> tuple[dict[str, Any], int | None]:
    """Write scores, plan and checkpoint; what the self-check compared, and the number of zeroed weights."""
    state, zeroed = module.merged()
    plan = replace(run.plan, weights_updated=True)
    origin = {"label": module.label, "measured_by": run.details.measured_by or str(run.path)}
    folder.write_decision(run.scores, plan, as_dict(run.details) | origin)
    card = model_card(plan, layout_of(module.checkpoint.config), run.calibration_facts)
    return write_recovered(state, module.checkpoint, folder.pruned, card), zeroed
