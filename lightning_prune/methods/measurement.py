"""Data between a method and its run: an earlier measurement in, a decision out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.checkpoint.scores import Scores


@dataclass(frozen=True)
class SavedMeasurement:
    """Measurements of an earlier run, so that a new decision needs no calibration: ``details`` is its ``method.json``,
    ``calibration`` its ``calibration.json`` (None without data), ``seconds`` what measuring cost by phase."""

    scores: Scores
    details: dict[str, Any]
    calibration: dict[str, Any] | None
    run: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class DecisionFolder(Protocol):
    """The folder to which a run's results are written."""

    path: Path

    @property
    def pruned(self) -> Path:
        """The checkpoint's folder, which does not exist yet."""

    def write_decision(self, scores: Scores, plan: PruningPlan, details: dict[str, Any]) -> None:
        """Keep what was measured and decided, each file whole or not at all."""

    def write_step(self, plan: PruningPlan, write: Callable[[Path], None]) -> None:
        """Keep a decision that is not the last one: its plan, and the checkpoint that ``write`` makes of a folder."""
