"""What every pruning method goes through in ``test_every_method.py``: one line per system, and one way to run it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from transformers import PreTrainedModel

import lightning_prune
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.methods import FLAP, HGSP, REAP, HEAPr, Magnitude, ShortGPT, SlimGPT, Wanda
from lightning_prune.methods.base import PruningMethod
from lightning_prune.runs.build import quiet
from lightning_prune.runs.run import prune_and_record
from tests.cutting import cut
from tests.tiny import make_moe, make_tiny, tiny_tokens


@dataclass(frozen=True)
class System:
    """A method with its options. ``removes``: what the ratio is made of, which decides how exactly it is met. ``kind``:
    which of ``MODELS`` it meets first."""

    make: Callable[..., PruningMethod]
    removes: Literal["groups", "layers", "weights", "experts"] = "groups"
    kind: str = "gqa-tied"


MODELS: dict[str, dict[str, Any]] = {"gqa-tied": {"kv_heads": 2}, "moe": {"experts": True, "width": 32, "layers": 3}}


def of_experts(make: Callable[..., PruningMethod], **options: Any) -> System:
    return System(partial(make, **options), "experts", "moe")


FAST_SYSTEMS = ("wanda", "slimgpt", "shortgpt", "hgsp_taylor_refit", "experts_kfac_refit")  # one of each kind of pass
SYSTEMS: dict[str, System] = {
    "magnitude": System(Magnitude),
    "wanda": System(Wanda),
    "flap": System(FLAP),
    "hgsp_taylor": System(partial(HGSP, importance="taylor")),
    "hgsp_wanda": System(partial(HGSP, importance="wanda")),
    # By block: a gate between layer and block would turn the rounding of one number into many decisions.
    "hgsp_fisher": System(partial(HGSP, importance="fisher", prior="gradient", tau=0)),
    "hgsp_kfac": System(partial(HGSP, importance="kfac", temperature=0)),
    "hgsp_taylor_refit": System(partial(HGSP, importance="taylor", temperature=0, refit="residual")),
    "slimgpt": System(SlimGPT),
    "shortgpt": System(ShortGPT, removes="layers"),
    "wanda_2to4": System(partial(Wanda, structure="2:4"), removes="weights"),
    "magnitude_unstructured": System(partial(Magnitude, structure="unstructured"), removes="weights"),
    "experts_magnitude": of_experts(Magnitude),
    "experts_wanda": of_experts(Wanda, units="all"),
    "experts_taylor": of_experts(HGSP, importance="taylor"),
    "experts_fisher": of_experts(HGSP, importance="fisher", prior="gradient", tau=0, units="expert"),
    "experts_kfac_refit": of_experts(HGSP, importance="kfac", temperature=0, refit="residual"),
    "heapr": of_experts(HEAPr),
    "reap": of_experts(REAP),
    "reap_refit": of_experts(REAP, refit="output"),
}


DENSE_SYSTEMS = tuple(name for name, system in SYSTEMS.items() if system.kind != "moe")
FAST_DENSE = tuple(name for name in FAST_SYSTEMS if name in DENSE_SYSTEMS)


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its metrics, the method, and the new weights of every layer as it made them."""

    folder: Path
    metrics: dict[str, Any]
    method: PruningMethod
    new_weights: list[dict[str, Tensor]]

    @property
    def pruned(self) -> Path:
        return self.folder / "pruned"

    @property
    def model(self) -> PreTrainedModel:
        """What the run decided, cut from the dense model in memory: no file of the run is read."""
        plan = self.method.plan
        dense = lightning_prune.load(self.method.pretrained, getattr(torch, plan.dtype))
        return cut(dense, plan, self.new_weights.__getitem__)


def save_model(folder: Path, **options: Any) -> Path:
    """A tiny random model (``tests.tiny.make_tiny``, or ``make_moe`` with ``experts``) as a Hugging Face folder without
    a tokenizer."""
    (make_moe if options.pop("experts", False) else make_tiny)(**options).save_pretrained(folder)
    return folder


def save_tokens(path: Path, tokens: Tensor | None = None) -> Path:
    """A token array, by default 10 samples of 16 tokens."""
    np.save(path, (tiny_tokens(10, 16) if tokens is None else tokens).numpy())
    return path


def trainer_for(method: PruningMethod, root: Path, precision: str = "32-true", logged: bool = False) -> L.Trainer:
    """The trainer of the command line, on the CPU and without a progress bar; TensorBoard's picture takes a third of a
    run on a tiny model, so ``logged`` runs alone have it."""
    quiet()
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        precision=precision,  # type: ignore[arg-type]
        logger=logged and TensorBoardLogger(root, name=method.label, default_hp_metric=False),
        default_root_dir=root,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )


def prune(
    method: PruningMethod,
    tokens: Path,
    root: Path,
    precision: str = "32-true",
    batch_size: int = 4,
    evaluate_on: list[Path] | None = None,
    logged: bool = False,
) -> Run:
    """One run through ``prune_and_record``; no evaluation unless asked for."""
    data = CalibrationDataModule(
        dataset=str(tokens),
        batch_size=batch_size,
        eval_datasets=[str(path) for path in evaluate_on or []],
        tokenizer=method.pretrained,
        continuations=0,
        cache_dir=str(root / "cache"),
    )
    found: list[dict[str, Tensor]] = []
    write = method._write_pruned

    def keep_new_weights(folder: Path) -> None:
        found.extend(method.driver.loop.new_parameters_of(layer) for layer in range(len(method.layers)))
        write(folder)

    method._write_pruned = keep_new_weights  # type: ignore[method-assign]
    trainer = trainer_for(method, root, precision, logged)
    folder, metrics = prune_and_record(trainer, method, data, config_of(method))
    return Run(folder, metrics, method, found)


def config_of(method: PruningMethod) -> str:
    """What the command line would write as ``config.yaml``, as far as a run reads it."""
    options = {"pretrained": method.pretrained, "pruning_ratio": method.pruning_ratio}
    return yaml.safe_dump({"model": {"class_path": type(method).__name__, "init_args": options}})


def temporary_files(root: Path) -> list[Path]:
    """What an interrupted write would leave: the hidden siblings that ``files.py`` writes to."""
    return [path for path in root.rglob("*") if path.name.startswith(".")]


def logits(model: Any) -> Tensor:
    """Logits of one fixed batch."""
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=tiny_tokens(2, 20, seed=9)).logits
    return result


# Of all others, whose passes are those of one above, the ones with a statistic of their own.
MEASURES = ("flap", "hgsp_fisher", "hgsp_kfac", "hgsp_wanda", "wanda_2to4", "experts_wanda", "experts_taylor", "heapr",
            "reap")  # fmt: skip
# Parameters of a test: one of each kind of pass always, those where slow tests run.
EACH_PASS = [*FAST_SYSTEMS, *(pytest.param(name, marks=pytest.mark.slow) for name in MEASURES)]
