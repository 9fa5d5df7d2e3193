"""One finished run and its accuracy on tasks, as every part of the comparison uses them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from lightning_prune.checkpoint.scores import Scores
from lightning_prune.methods.target import UNITS
from lightning_prune.runs.config_files import read_config
from lightning_prune.runs.folder import RunFolder
from lightning_prune.runs.records import Calibration, Environment, MethodDetails, Recovered, RunMetrics
from lightning_prune.runs.verdict import verdict_word

BYTES = {"B": 1} | {
    f"{one}{i}B": base**power for i, base in (("", 1000), ("i", 1024)) for power, one in enumerate("KMGT", 1)
}


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
        """The pruning ratio requested; the achieved one where memory, active parameters or layers were requested."""
        requested = self.metrics.pruning_ratio.requested
        return self.achieved if requested is None else requested

    @property
    def size(self) -> str:
        """The requested size, as tables show it: a ratio (also of a number of parameters), memory, or active
        parameters."""
        target = self.metrics.target
        if target is None and (memory := self.options.get("target_memory")):  # a run before the record had it
            return memory if str(memory)[-1:].isalpha() else f"{memory} B"
        return f"{self.requested:g}" if target is None or target.kind == "parameters" else str(self.target)

    @property
    def target(self) -> str | None:
        """The size requested in place of a ratio: ``4.5B`` (parameters), ``800M active``, ``6GiB``; None for none."""
        if (target := self.metrics.target) is None:
            return None
        text = shortest(target.limit, BYTES if target.kind == "memory" else UNITS)
        return f"{text} active" if target.kind == "active_parameters" else text

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


def shortest(number: int, units: Mapping[str, int]) -> str:
    """The shortest text that says exactly ``number`` in one of the ``units``, whose first is 1."""
    texts = [f"{number}{next(iter(units))}"]
    for name, unit in units.items():
        text = f"{number / unit:.12g}"
        if "e" not in text and Fraction(text) * unit == number:
            texts.append(text + name)
    return min(texts, key=len)


def load_run(folder: Path) -> Run:
    """Read one run folder, its score table too, or raise UserError."""
    run = RunFolder.open(folder, "--runs")
    model = read_config(folder / "config.yaml", "--runs").get("model")
    given = model.get("init_args") if isinstance(model, dict) else None
    options = given if isinstance(given, dict) else {}
    return Run(folder, run.metrics, run.calibration, run.environment, run.details, run.scores, options, run.recovery)
