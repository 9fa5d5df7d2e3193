"""One finished run as the comparison sees it. Reads files only: no torch, no Lightning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prune.reporting.verdict import is_unusable
from lightning_prune.runs.folder import RunFolder
from lightning_prune.runs.records import PRUNING_PHASES, as_dict
from lightning_prune.runs.score_table import ScoreTable


@dataclass(frozen=True)
class Run:
    """One run folder. ``calibration`` is None for methods that read no data; perplexities may be None (not finite)."""

    folder: Path
    label: str
    metrics: dict[str, Any]
    calibration: dict[str, Any] | None
    environment: dict[str, Any]
    details: dict[str, Any]
    units: ScoreTable

    @property
    def requested(self) -> float:
        """The pruning ratio asked for; the one reached where a number of layers was asked for."""
        ratio = self.metrics["pruning_ratio"]["requested"]
        return self.achieved if ratio is None else float(ratio)

    @property
    def achieved(self) -> float:
        """The pruning ratio reached."""
        return float(self.metrics["pruning_ratio"]["achieved"])

    @property
    def method(self) -> str:
        """The method's own name; several labels may share it."""
        return str(self.metrics["method"]["name"])

    @property
    def base_model(self) -> str:
        """Name or path of the dense model."""
        return str(self.metrics["method"]["base_model"])

    @property
    def evaluation(self) -> dict[str, dict[str, Any]]:
        """Protocol by evaluation set."""
        found: dict[str, dict[str, Any]] = self.metrics.get("evaluation", {})
        return found

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds by phase."""
        found: dict[str, float] = self.metrics["seconds"]
        return found

    @property
    def pruning_seconds(self) -> float:
        """What calibrating and pruning cost, loading and evaluation apart; a run that decided from another's scores
        bears what measuring them cost."""
        measured: dict[str, float] = self.metrics["method"].get("measured_seconds", {})
        return sum(times.get(phase, 0.0) for times in (self.seconds, measured) for phase in PRUNING_PHASES)

    @property
    def reused_scores(self) -> bool:
        """Whether the run decided from scores that another ratio's run had measured."""
        return bool(self.metrics["method"].get("scores_reused", False))

    def perplexity(self, name: str, which: str = "pruned") -> float | None:
        """``pruned`` or ``dense`` perplexity on one evaluation set."""
        value = self.metrics["perplexity"][name][which]
        return None if value is None else float(value)

    def unusable_on(self, name: str) -> bool:
        """No better than chance on this evaluation set; see ``reporting.verdict``."""
        return is_unusable(self.perplexity(name), self.evaluation.get(name, {}).get("unigram_perplexity"))


def load_run(folder: Path) -> Run:
    """Read one run folder, its score table too.

    Raises:
        UserError: not the folder of a finished pruning run, or a file in it is not what it should be.
    """
    run = RunFolder.open(folder, "--runs")
    return Run(
        folder=folder,
        label=run.metrics.method.label,
        metrics=as_dict(run.metrics),
        calibration=None if run.calibration is None else as_dict(run.calibration),
        environment=as_dict(run.environment),
        details=as_dict(run.details),
        units=run.scores,
    )
