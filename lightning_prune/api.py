"""The commands as functions: the same objects, runs and folders, exceptions instead of exit statuses."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import torch
from transformers import PreTrainedModel

from lightning_prune.checkpoint.apply import apply
from lightning_prune.comparison import accuracy, costs
from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.records import Run, load_run
from lightning_prune.comparison.repeats import repeats
from lightning_prune.comparison.zero_shot import ZeroShot
from lightning_prune.data.in_memory import as_dataset, calibration_set
from lightning_prune.evaluation.perplexity import Evaluation
from lightning_prune.export.export import export
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.pruned_model import PrunedModel
from lightning_prune.runs.build import RunBuilder
from lightning_prune.runs.config_files import config_file, read_config
from lightning_prune.runs.run import prune_and_record
from lightning_prune.support.errors import UserError
from lightning_prune.support.quiet import quiet_transformers

HALF = {torch.bfloat16: "bf16-true", torch.float16: "16-true"}  # precisions of a model that is loaded in them
__all__ = ["PrunedModel", "UserError", "apply", "calibration_set", "compare", "evaluate", "export", "load", "prune"]


def prune(
    model: str | Path | PreTrainedModel,
    method: str = "hgsp_taylor",
    pruning_ratio: float = 0.2,
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
        model: folder, hub id (``demo`` is the model inside the package), or a loaded causal LM, whose weights are
            written to a temporary folder first: calibration reads them layer by layer from there.
        method: a shipped configuration (``wanda``, ``hgsp_taylor_refit``, …) or a YAML file.
        pruning_ratio: share of all parameters to remove, embeddings and head included.
        calibration: name of a corpus, a file, or token ids ``[N, L]`` (``calibration_set``). Default: as ``fit``.
        evaluate_on: sets to measure perplexity on, each as ``calibration``. Default: none.
        folder: root of run folders, which are kept; None keeps the run as long as the result lives.
        precision: of the trainer; by default ``32-true``, for a loaded model in half precision its own.
        accelerator: of the trainer.
        tokenizer: of a loaded model; needed where texts are read, and saved with the checkpoint.
        inplace: turn the loaded ``model`` itself into the pruned one.
        verbose: show progress.
        data: further options of the calibration set (``seq_len``, ``batch_size``, …).
        options: of the method, such as ``score_norm`` or ``refit``.

    Raises:
        UserError: a mistake in the arguments; nothing has been written then.
        FloatingPointError: NaN or infinite values; says where.
    """
    if inplace and not isinstance(model, PreTrainedModel):
        raise UserError("inplace: only a model that is loaded can be turned into the pruned one.")
    keep = tempfile.TemporaryDirectory(prefix="lightning-prune-")
    work = Path(keep.name)
    own = read_config(config_file(method, option="method"), "method")
    pretrained = str(model)
    if isinstance(model, PreTrainedModel):
        pretrained = str(work / "dense")
        with quiet_transformers():
            model.save_pretrained(pretrained)
        if tokenizer is not None:
            tokenizer.save_pretrained(pretrained)
        precision = precision or HALF.get(model.dtype)
    dataset = as_dataset(calibration, work, "calibration")
    sets = [as_dataset(one, work, f"evaluation_{number}") for number, one in enumerate(evaluate_on)]
    chosen = {"pretrained": pretrained, "pruning_ratio": pruning_ratio, **options}
    configuration = {
        "model": own["model"] | {"init_args": own["model"].get("init_args", {}) | chosen},
        "data": {
            **own.get("data", {}),
            **({} if dataset is None else {"dataset": dataset}),
            "eval_datasets": sets,
            **(data or {}),
        },
        "trainer": {
            "precision": precision,
            "accelerator": accelerator,
            "default_root_dir": str(work / "logs" if folder is None else folder),
            "enable_progress_bar": verbose,
            **({"logger": False} if folder is None else {}),
        },
    }
    built = RunBuilder(configuration)
    path, _ = prune_and_record(built.trainer, built.model, built.datamodule, built.resolved_config)
    found = PrunedModel(path, keep)
    if inplace and isinstance(model, PreTrainedModel):
        found.into(model)
    return found


def evaluate(
    model: str | Path | PrunedModel,
    on: Sequence[Any],
    *,
    seq_len: int = 128,
    precision: str = "32-true",
    accelerator: str = "auto",
    verbose: bool = True,
) -> dict[str, float]:
    """Perplexity by evaluation set, with the protocol of ``lightning-prune test``.

    Args:
        model: folder, hub id, or what ``prune`` returned.
        on: corpora, files, or token ids ``[N, L]``.
        seq_len: tokens per window of texts.
        precision: of the trainer.
        accelerator: of the trainer.
        verbose: show progress.

    Raises:
        UserError: a mistake in the arguments, or nothing to evaluate on.
    """
    if not on:
        raise UserError("on: nothing to evaluate on. Name at least one corpus, file or token array.")
    source = model.folder / "pruned" if isinstance(model, PrunedModel) else model
    with tempfile.TemporaryDirectory(prefix="lightning-prune-") as work:
        sets = [as_dataset(one, Path(work), f"set_{number}") for number, one in enumerate(on)]
        windows = {} if any(not isinstance(one, str | Path) for one in on) else {"eval_seq_len": seq_len}
        configuration = {
            "model": {"pretrained": str(source)},
            "data": {"eval_datasets": sets, **windows},
            "trainer": {
                "precision": precision,
                "accelerator": accelerator,
                "logger": False,
                "enable_progress_bar": verbose,
                "default_root_dir": work,
            },
        }
        built = RunBuilder(configuration, Evaluation, "test")
        built.model.check_model()
        built.datamodule.needs_calibration = False
        built.datamodule.setup("test")
        with closing(built.model.progress):
            built.trainer.test(built.model, built.datamodule, verbose=False)
        built.model.slot.close()
        return {name: result.perplexity for name, result in built.model.perplexity.items()}


def compare(
    runs: Sequence[PrunedModel | str | Path],
    *,
    zero_shot: Sequence[str] = (),
    include_path: str | Path | None = None,
    folder: str | Path | None = None,
    verbose: bool = True,
) -> pd.DataFrame:
    """One row per system and ratio, best first within a ratio: what ``lightning-prune compare --runs`` shows.

    Runs that differ in nothing but the seed of their calibration samples are one row with mean, sample standard
    deviation (``deviation …``) and number (``n``), where every system had the same seeds.

    ``attrs["differences"]`` lists what makes runs incomparable (other tokens, evaluation, base model or ratio).

    Args:
        runs: folders of runs, or what ``prune`` returned.
        zero_shot: tasks of the LM Evaluation Harness, as ``--zero-shot``: columns ``acc <task>``, a share of 1, and
            ``stderr <task>``; ``attrs["dense"]`` has those of the dense models, by base model.
        include_path: folder of tasks of your own.
        folder: root below which accuracies are kept, so that no checkpoint is measured twice; None keeps none.
        verbose: say which checkpoint is being measured.

    Raises:
        UserError: a folder that is not a finished run, none at all, or a task that is not there.
    """
    if not runs:
        raise UserError("runs: nothing to compare.")
    found = [load_run(one.folder if isinstance(one, PrunedModel) else Path(one)) for one in runs]
    if zero_shot:
        with tempfile.TemporaryDirectory(prefix="lightning-prune-") as work:
            own_tasks = None if include_path is None else Path(include_path)
            tasks = ZeroShot(list(zero_shot), own_tasks, Path(folder or work), verbose)
            tasks.check()
            found = tasks.measure(found)
    result = audit(found)
    lines = [line for group in result.groups for line in repeats(group.all)]
    rows = []
    for line in lines:
        row: dict[str, Any] = {"system": line.first.label, "ratio": line.first.requested}
        row["achieved"] = line.average(lambda run: run.achieved)
        row |= {f"perplexity {name}": line.perplexity(name).mean for name in line.sets}
        if len(lines) < len(found):
            row |= {f"deviation {name}": line.perplexity(name).deviation for name in line.sets} | {"n": len(line.runs)}
        row |= _accuracies(line.runs, found)
        rows.append(row | {"calibrate s": line.average(costs.calibration), "prune s": line.average(costs.pruning)})
    table = pd.DataFrame(rows)
    quality = [name for name in table.columns if name.startswith("perplexity ")]
    table = table.sort_values(["ratio", *quality[:1]], ignore_index=True)
    table.attrs["differences"] = [str(one) for one in result.differences]
    if zero_shot:
        table.attrs["dense"] = {run.metrics.method.base_model: _accuracies([run], found, dense=True) for run in found}
    return table


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
