"""What ``prune`` gives back: one finished run as an object."""

import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.runs.folder import FinishedRun, RunFolder
from lightning_prune.runs.records import as_dict
from lightning_prune.support.errors import UserError

if TYPE_CHECKING:
    from lightning_prune.checkpoint.plan import PruningPlan


class PrunedModel:
    """A finished run: its folder is what ``lightning-prune fit`` leaves.

    Attributes:
        folder: of the run. A temporary one lives as long as this object.
    """

    def __init__(self, folder: Path, keep: Any = None) -> None:
        self.folder = folder
        self._keep = keep  # what removes a temporary folder when it goes

    @cached_property
    def model(self) -> PreTrainedModel:
        """The pruned model in its checkpoint's dtype, loaded when it is asked for."""
        return Checkpoint.open(str(self.folder / "pruned")).load(None)

    @cached_property
    def run(self) -> FinishedRun:
        """The records of the run."""
        return RunFolder.open(self.folder, "folder")

    @property
    def plan(self) -> "PruningPlan":
        """What is kept of every layer."""
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
            raise UserError(f"save_pretrained: '{target}' exists and is not an empty folder.")
        shutil.copytree(self.folder / "pruned", target, dirs_exist_ok=True)

    def into(self, model: PreTrainedModel) -> None:
        """Turn ``model`` itself, the dense one that was pruned, into the pruned one, in its dtype and on its device."""
        pruned = Checkpoint.open(str(self.folder / "pruned")).load(model.dtype).to(model.device)  # type: ignore[arg-type]
        training = model.training
        model.__class__ = pruned.__class__
        model.__dict__ = pruned.__dict__
        model.train(training)

    def __repr__(self) -> str:
        ratio, parameters = self.metrics["pruning_ratio"]["achieved"], self.metrics["parameters"]
        words = [f"{name}: {dense:.2f} → {pruned:.2f}" for name, (dense, pruned) in self.perplexity.items()]
        return (
            f"PrunedModel({self.plan.method}, {parameters['dense']:,} → {parameters['pruned']:,} parameters "
            f"({ratio:.1%} less), perplexity {', '.join(words) or 'not measured'})"
        )
