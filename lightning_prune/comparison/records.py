"""One finished run and its accuracy on tasks, as every part of the comparison uses them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prune.checkpoint.scores import Scores
from lightning_prune.runs.config_files import read_config
from lightning_prune.runs.folder import RunFolder
from lightning_prune.runs.records import Calibration, Environment, MethodDetails, Recovered, RunMetrics
from lightning_prune.runs.verdict import verdict_word


@dataclass(frozen=True)
class Score:
    """A metric as the harness gives it, and its standard error; None where there is none."""

    value: float | None
    stderr: float | None


@dataclass(frozen=True)
class Accuracy:
    """Scores by task, then by metric, of a pruned model and of its base model; ``harness`` is a version."""

    pruned: dict[str, dict[str, Score]]
    dense: dict[str, dict[str, Score]]
    harness: str


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder; a run is equal to itself only, so it can be a key."""

    folder: Path
    metrics: RunMetrics
    calibration: Calibration | None  # None for methods that read no data
    environment: Environment
    details: MethodDetails
    units: Scores
    options: dict[str, Any]  # the method's, as in config.yaml
    recovery: Recovered | None = None  # of a run that trained the pruned model of another run
    accuracy: Accuracy | None = None  # where zero-shot tasks were measured

    @property
    def label(self) -> str:
        """Name of the system that was run."""
        return self.metrics.method.label

    @property
    def achieved(self) -> float:
        """The pruning ratio that was reached."""
        return self.metrics.pruning_ratio.achieved

    @property
    def requested(self) -> float:
        """The pruning ratio requested; the achieved one where a number of layers was requested."""
        requested = self.metrics.pruning_ratio.requested
        return self.achieved if requested is None else requested

    @property
    def size(self) -> str:
        """The requested size, as tables show it: a ratio, or memory."""
        memory = str(self.options.get("target_memory") or "")
        return (memory if memory[-1:].isalpha() else f"{memory} B") if memory else f"{self.requested:g}"

    @property
    def seed(self) -> int | None:
        """The seed that drew the calibration samples; None where nothing was drawn."""
        return None if self.calibration is None else self.calibration.seed

    @property
    def sets(self) -> list[str]:
        """Names of the evaluation sets."""
        return list(self.metrics.perplexity)

    def perplexity(self, name: str) -> float | None:
        """Perplexity of the pruned model on one evaluation set; None where it is not finite."""
        return self.metrics.perplexity[name].pruned

    def dense(self, name: str) -> float | None:
        """Perplexity of the dense model on one evaluation set; None where it is not finite."""
        return self.metrics.perplexity[name].dense

    def divergence(self, name: str) -> float | None:
        """KL(dense ‖ pruned) on one evaluation set, infinite where it is not finite; None where nobody measured it."""
        distance = self.metrics.distance.get(name)
        return None if distance is None else math.inf if distance.kl_divergence is None else distance.kl_divergence

    def shown_perplexity(self, name: str) -> float | str:
        """The pruned model's perplexity as text, in words where it is not finite."""
        value = self.perplexity(name)
        return "not finite" if value is None else value

    def verdict(self, name: str, perplexity: float | None, divergence: float | None) -> str:
        """The word for ``perplexity`` and ``divergence`` on one evaluation set."""
        unigram = self.metrics.evaluation[name].unigram_perplexity
        return verdict_word(perplexity, self.dense(name), unigram, divergence)


def load_run(folder: Path) -> Run:
    """Read one run folder, its score table too, or raise UserError."""
    run = RunFolder.open(folder, "--runs")
    model = read_config(folder / "config.yaml", "--runs").get("model")
    given = model.get("init_args") if isinstance(model, dict) else None
    options = given if isinstance(given, dict) else {}
    return Run(folder, run.metrics, run.calibration, run.environment, run.details, run.scores, options, run.recovery)
