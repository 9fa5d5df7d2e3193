"""The commands as functions: the same objects, runs and folders, exceptions instead of exit statuses."""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

from lightning_prune.checkpoint.apply import apply
from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.comparison import accuracy, costs
from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.records import Run, load_run
from lightning_prune.comparison.repeats import Repeats, by_size, repeats
from lightning_prune.comparison.zero_shot import ZeroShot
from lightning_prune.data.in_memory import as_dataset, calibration_set
from lightning_prune.data.tokenization import load_tokenizer
from lightning_prune.evaluation.perplexity import Evaluation, measure
from lightning_prune.formats.export import export
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.live import unwrapped, written
from lightning_prune.runs.build import RunBuilder, check_one_size, sizes_in, without_size
from lightning_prune.runs.config_files import config_file, read_config
from lightning_prune.runs.folder import FinishedRun, RunFolder
from lightning_prune.runs.records import as_dict
from lightning_prune.runs.run import prune_and_record
from lightning_prune.support.errors import UserError

HALF = {torch.bfloat16: "bf16-true", torch.float16: "16-true"}  # precisions of a model that is loaded in them
DISTANCES = {"KL": "kl_divergence", "top-1": "top1_agreement", "acceptance": "expected_acceptance"}  # of a column
CALLER = 5  # stacklevel of a warning at the line that calls the function: Lightning's four, and the function
__all__ = ["PrunedModel", "UserError", "apply", "calibration_set", "compare", "evaluate", "export", "load", "prune"]


class PrunedModel:
    """A finished run: ``folder`` is the run folder that ``fit`` writes; a temporary one is deleted with this object."""

    def __init__(self, folder: Path, keep: Any = None) -> None:
        self.folder = folder
        self._keep = keep  # what removes a temporary folder when it is gone itself

    def __fspath__(self) -> str:
        return str(self.folder)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The pruned model in its checkpoint's dtype, loaded when it is first used."""
        return load(self.folder / "pruned")

    @cached_property
    def run(self) -> FinishedRun:
        """The records of the run."""
        return RunFolder.open(self.folder, "folder")

    @property
    def plan(self) -> PruningPlan:
        """The pruning plan: the units kept in every layer."""
        return self.run.plan

    @cached_property
    def scores(self) -> pd.DataFrame:
        """One row per prunable unit: layer, block, unit, importance, cost, prior, score, pruned."""
        return pd.DataFrame({name: list(values) for name, values in self.run.scores.columns().items()})

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """``metrics.json``: perplexities, parameters, ratio, seconds."""
        return as_dict(self.run.metrics)

    @property
    def perplexity(self) -> dict[str, tuple[float, float]]:
        """Dense and pruned perplexity by evaluation set."""
        return {name: (item["dense"], item["pruned"]) for name, item in self.metrics["perplexity"].items()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the checkpoint: what ``from_pretrained`` loads, with its model card.

        Raises:
            UserError: ``folder`` exists and is not empty.
        """
        target = Path(folder)
        if target.exists() and any(target.iterdir()):
            raise UserError(
                f"save_pretrained: '{target}' exists and is not an empty folder. Give a new or an empty one."
            )
        shutil.copytree(self.folder / "pruned", target, dirs_exist_ok=True)

    def into(self, model: PreTrainedModel) -> None:
        """Turn ``model`` itself, the dense one that was pruned, into the pruned one, in its dtype and on its device."""
        pruned = load(self.folder / "pruned", model.dtype).to(model.device)  # type: ignore[arg-type]
        training = model.training
        model.__class__ = pruned.__class__
        model.__dict__ = pruned.__dict__
        model.train(training)

    def __repr__(self) -> str:
        label, parameters, ratio = self.run.metrics.method.label, self.plan.parameters, self.plan.achieved_ratio
        words = [f"{name}: {dense:.2f} → {pruned:.2f}" for name, (dense, pruned) in self.perplexity.items()]
        return (
            f"PrunedModel({label}, {parameters['dense']:,} → {parameters['pruned']:,} parameters "
            f"({ratio:.1%} less), perplexity {', '.join(words) or 'not measured'})"
        )


def prune(
    model: str | Path | PreTrainedModel,
    method: str = "hgsp_kfac_refit",
    pruning_ratio: float | None = None,
    calibration: Any = None,
    *,
    evaluate_on: Sequence[Any] = (),
    folder: str | Path | None = None,
    precision: str | None = None,
    accelerator: str = "auto",
    tokenizer: Any = None,
    inplace: bool = False,
    verbose: bool = True,
    data: Mapping[str, Any] | None = None,
    **options: Any,
) -> PrunedModel:
    """Calibrate and prune, as ``lightning-prune fit --method <method>`` does.

    Args:
        model: folder, hub id (``demo`` is the model inside the package), or a loaded causal LM (compiled and
            data-parallel ones too), whose weights are written to a temporary folder first: calibration reads them layer
            by layer from there.
        method: a shipped configuration (``wanda``, ``hgsp_taylor_refit``, …) or a YAML file.
        pruning_ratio: share of all parameters to remove, embeddings and head included. Default: the configuration's,
            0.2, or what an option like ``target_parameters`` says.
        calibration: name of a corpus, a file, or token ids ``[N, L]`` (``calibration_set``). Default: as ``fit``.
        evaluate_on: sets to measure perplexity on, each as ``calibration``. Default: none.
        folder: root of run folders, which are kept; None keeps the run as long as the result lives.
        precision: of the trainer; by default ``32-true``, for a loaded model in half precision its own.
        accelerator: of the trainer.
        tokenizer: of a loaded model, or its folder or hub id; needed where texts are read, and saved with the
            checkpoint.
        inplace: turn the loaded ``model`` itself into the pruned one.
        verbose: show progress.
        data: further options of the calibration set (``seq_len``, ``batch_size``, …).
        options: of the method, such as ``score_norm`` or ``refit``.

    Raises:
        UserError: a mistake in the arguments; nothing has been written then.
        FloatingPointError: NaN or infinite values; says where.
    """
    model = unwrapped(model)
    if inplace and not isinstance(model, PreTrainedModel):
        raise UserError(
            "inplace: found a path. Only a loaded model can become the pruned one: load it with from_pretrained, or "
            "leave inplace out."
        )
    keep = tempfile.TemporaryDirectory(prefix="lightning-prune-")
    work = Path(keep.name)
    own = read_config(config_file(method, option="method"), "method")
    pretrained = str(model)
    if isinstance(model, PreTrainedModel):
        pretrained = written(model, work / "dense", load_tokenizer(tokenizer))
        precision = precision or HALF.get(model.dtype)
    dataset = as_dataset(calibration, work, "calibration")
    sets = [as_dataset(one, work, f"evaluation_{number}") for number, one in enumerate(_several(evaluate_on))]
    options |= {} if pruning_ratio is None else {"pruning_ratio": pruning_ratio}
    check_one_size(options)
    default = own["model"].get("init_args", {})
    chosen = (without_size(default) if sizes_in(options) else default) | {"pretrained": pretrained, **options}
    given = {"eval_datasets": sets} | ({} if dataset is None else {"dataset": dataset})
    configuration = {
        "model": own["model"] | {"init_args": chosen},
        "data": own.get("data", {}) | given | dict(data or {}),
        "trainer": _trainer(precision, accelerator, verbose, folder or work / "logs", logger=None if folder else False),
    }
    built = RunBuilder(configuration)
    path, _ = prune_and_record(built.trainer, built.model, built.datamodule, built.resolved_config)
    if inplace and isinstance(model, PreTrainedModel):
        PrunedModel(path).into(model)
    try:
        return PrunedModel(path, keep)
    finally:
        del keep  # exceptions that jsonargparse holds on to would keep it alive through this frame


def evaluate(
    model: str | Path | PreTrainedModel | PrunedModel,
    on: Sequence[Any],
    *,
    seq_len: int | None = None,
    bos: str = "auto",
    precision: str = "32-true",
    accelerator: str = "auto",
    verbose: bool = True,
    dense: str | Path | PreTrainedModel | None = None,
) -> dict[str, float] | dict[str, dict[str, float]]:
    """Perplexity by evaluation set, with the protocol of ``lightning-prune test``; with ``dense``, by set a mapping of
    ``perplexity``, ``dense_perplexity``, ``kl_divergence`` (dense ‖ model, nats per token), ``top1_agreement`` and
    ``expected_acceptance``.

    Args:
        model: folder, hub id, loaded causal LM, or what ``prune`` returned.
        on: corpora, files, or token ids ``[N, L]``.
        seq_len: tokens per window of texts, by default 128; token ids are measured in rows of their own length.
        bos: whether they begin with the beginning-of-sequence token, as ``--data.bos``.
        precision: of the trainer.
        accelerator: of the trainer.
        verbose: show progress.
        dense: a model with the same tokenizer to compare with.

    Raises:
        UserError: a mistake in the arguments, nothing to evaluate on, or another vocabulary.
    """
    on = _several(on)
    if not on:
        raise UserError("on: nothing to evaluate on. Name at least one corpus, file or token array.")
    source = unwrapped(model.folder / "pruned" if isinstance(model, PrunedModel) else model)
    with tempfile.TemporaryDirectory(prefix="lightning-prune-") as work:
        if isinstance(source, PreTrainedModel):
            source = written(source, Path(work) / "model", _tokenizer_of(source))
        other = None if dense is None else unwrapped(dense)
        if isinstance(other, PreTrainedModel):
            other = written(other, Path(work) / "dense")
        sets = [as_dataset(one, Path(work), f"set_{number}") for number, one in enumerate(on)]
        configuration = {
            "model": {"pretrained": str(source)},
            "data": {"eval_datasets": sets, "eval_seq_len": seq_len, "bos": bos, "continuations": 0},
            "trainer": _trainer(precision, accelerator, verbose, work, logger=False),
        }
        built = RunBuilder(configuration, Evaluation, "test")
        built.model.check_model()
        reference = None if other is None else built.model.check_dense(str(other))
        built.datamodule.needs_calibration = built.datamodule.cuts_eval_arrays = False
        built.datamodule.setup("test")
        dense, model, data = None, built.model, built.datamodule
        with closing(model.progress):
            if reference is not None:
                dense = measure(built.trainer, data, reference, "dense", model.slot, model.progress, Path(work))
                model.reference = dense
            built.trainer.test(model, data, verbose=False)
        model.slot.close()
        if dense is None:
            return {name: result.perplexity for name, result in model.perplexity.items()}
        dense.close()
        return {
            name: {"perplexity": result.perplexity, "dense_perplexity": dense.perplexity[name].perplexity}
            | asdict(model.measured.distance[name])
            for name, result in model.perplexity.items()
        }


def compare(
    runs: PrunedModel | str | Path | Sequence[PrunedModel | str | Path],
    *,
    zero_shot: Sequence[str] = (),
    include_path: str | Path | None = None,
    folder: str | Path | None = None,
    verbose: bool = True,
) -> pd.DataFrame:
    """One row per system and size, best first within a size: what ``lightning-prune compare --runs`` shows. The size is
    ``ratio``, or ``target`` where memory or active parameters were requested; ``ratio`` is then the achieved one.

    Runs that differ in nothing but the seed of their calibration samples are one row with mean, sample standard
    deviation (``deviation …``) and number (``n``), where every system had the same seeds. ``KL …``, ``top-1 …`` and
    ``acceptance …`` are the distance from the dense model.

    ``attrs["differences"]`` lists what makes runs incomparable (other tokens, evaluation, base model or ratio). Where
    the command line shows several tables, a first column ``table`` numbers them, and a warning names the differences.

    Args:
        runs: folders of runs, or what ``prune`` returned; one may be given as it is.
        zero_shot: tasks of the LM Evaluation Harness, as ``--zero-shot``: columns ``acc <task>``, a share of 1, and
            ``stderr <task>``; ``attrs["dense"]`` has those of the dense models, by base model.
        include_path: folder of tasks of your own.
        folder: root below which accuracies are kept, so that no checkpoint is measured twice; None keeps none.
        verbose: say which checkpoint is being measured.

    Raises:
        UserError: a folder that is not a finished run, none at all, or a task that is not there.
    """
    runs = _several(runs)
    if not runs:
        raise UserError("runs: the list is empty. Give at least one run.")
    loaded = [load_run(one.folder if isinstance(one, PrunedModel) else Path(one)) for one in runs]
    if zero_shot:
        with tempfile.TemporaryDirectory(prefix="lightning-prune-") as work:
            own_tasks = None if include_path is None else Path(include_path)
            tasks = ZeroShot(list(zero_shot), own_tasks, Path(folder or work), verbose)
            tasks.check()
            loaded = tasks.measure(loaded)
    result = audit(loaded)
    tables = [(number, line) for number, group in enumerate(result.groups, 1) for line in repeats(group.all)]
    lines = [line for _, line in tables]
    rows, place = [], {size: number for number, size in enumerate(by_size(lines))}
    for number, line in tables:
        row = {"table": number} | _quality(line, any(run.target for run in loaded))
        if len(lines) < len(loaded):
            row |= {f"deviation {name}": line.perplexity(name).deviation for name in line.sets} | {"n": len(line.runs)}
        row |= _accuracies(line.runs, loaded)
        rows.append(row | {"calibrate s": line.average(costs.calibration), "prune s": line.average(costs.pruning)})
    table = pd.DataFrame(rows)
    quality = [name for name in table.columns if name.startswith("perplexity ")]
    # The first set may be one that another table's runs were measured on.
    order = table.assign(size=[place[line.size] for line in lines]).sort_values(["table", "size", *quality]).index
    table = table.loc[order].reset_index(drop=True).drop(columns=[] if len(result.groups) > 1 else "table")
    if len(result.groups) > 1:
        what = ", ".join(one.what for one in result.differences if one.what != "achieved ratio")
        said = "do not compare rows of different tables (column 'table'). attrs['differences'] says what each run has."
        rank_zero_warn(f"These runs differ in {what}: {said}", stacklevel=CALLER)
    if not quality and not zero_shot:
        rank_zero_warn("No run measured a perplexity: give evaluate_on to lp.prune.", stacklevel=CALLER)
    table.attrs["differences"] = [str(one) for one in result.differences]
    if zero_shot:
        table.attrs["dense"] = {run.metrics.method.base_model: _accuracies([run], loaded, dense=True) for run in loaded}
    return table


def _tokenizer_of(model: PreTrainedModel) -> Any:
    """The tokenizer in the folder that a model was loaded from, if it is still there."""
    folder = model.name_or_path
    return Checkpoint.open(folder).tokenizer if folder and Path(folder, "config.json").is_file() else None


def _several(given: Any) -> Sequence[Any]:
    """Evaluation sets, or runs; one may be given as it is."""
    return [given] if isinstance(given, str | os.PathLike) or hasattr(given, "shape") else list(given)


def _trainer(
    precision: str | None, accelerator: str, verbose: bool, root: str | Path, logger: bool | None
) -> dict[str, Any]:
    options = {"precision": precision, "accelerator": accelerator, "enable_progress_bar": verbose, "logger": logger}
    return options | {"default_root_dir": str(root)}


def _quality(line: Repeats, with_targets: bool) -> dict[str, Any]:
    """Size, perplexity and distance of one row of ``compare``."""
    size: dict[str, Any] = {"system": line.first.label, "ratio": line.first.requested, "achieved": line.achieved}
    size |= {"target": line.first.target} if with_targets else {}
    perplexity = {f"perplexity {name}": line.perplexity(name).mean for name in line.sets}
    return (
        size
        | perplexity
        | {
            f"{key} {name}": line.distance(name, field).mean
            for name in line.sets
            for key, field in DISTANCES.items()
            if name in line.first.metrics.distance
        }
    )


def _accuracies(runs: Sequence[Run], among: Sequence[Run], dense: bool = False) -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    for task, metric in accuracy.shown_tasks(among).items():
        score = accuracy.mean(runs, task, metric, dense)
        row |= {f"{metric} {task}": score.value, f"stderr {task}": score.stderr}
    return row


def load(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a pruned checkpoint (or a dense model) for inference or training, without remote code.

    Args:
        path: folder or hub id; ``demo`` is the embedded model.
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        UserError: nothing to load there, or not a supported model.
    """
    return Checkpoint.open(str(path)).load(dtype)
