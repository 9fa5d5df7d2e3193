"""One finished run as the comparison sees it. Reads files only: no torch, no Lightning."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.checkpoint.scores import Scores
from lightning_prune.comparison.accuracy import Accuracy
from lightning_prune.runs.folder import RunFolder
from lightning_prune.runs.records import as_dict
from lightning_prune.runs.verdict import verdict_word
from lightning_prune.support.errors import UserError


@dataclass(frozen=True)
class Run:
    """One run folder. ``calibration`` is None for methods that read no data; perplexities may be None (not finite)."""

    folder: Path
    label: str
    metrics: dict[str, Any]
    calibration: dict[str, Any] | None
    environment: dict[str, Any]
    details: dict[str, Any]
    units: Scores
    options: dict[str, Any] = field(default_factory=dict)  # the method's, as in config.yaml
    recovery: dict[str, Any] | None = None  # of a run that trained what another one had pruned
    accuracy: Accuracy | None = None  # where zero-shot tasks were measured

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
    def reused_scores(self) -> bool:
        """Whether the run decided from scores that another ratio's run had measured."""
        return bool(self.metrics["method"].get("scores_reused", False))

    @property
    def measured_by(self) -> str | None:
        """The folder of the run that calibrated, where this one reused its scores."""
        found = self.details.get("measured_by")
        return None if found is None else str(found)

    @property
    def measured_seconds(self) -> dict[str, float]:
        """Seconds by phase of the run that calibrated, where this one reused its scores and recorded them."""
        found: dict[str, float] = self.metrics["method"].get("measured_seconds", {})
        return found

    @property
    def sets(self) -> list[str]:
        """Names of the evaluation sets."""
        return list(self.metrics["perplexity"])

    @property
    def dense_parameters(self) -> int:
        """Parameters of the base model, tied ones once."""
        return int(self.metrics["parameters"]["dense"])

    @property
    def pruned_parameters(self) -> int:
        """Parameters left; masks leave all of them."""
        return int(self.metrics["parameters"]["pruned"])

    @property
    def base_model_sha256(self) -> str | None:
        """Fingerprint of the base model's weights, None where none was taken."""
        found = self.metrics["method"].get("base_model_sha256")
        return None if found is None else str(found)

    @property
    def peak_memory_bytes(self) -> int:
        """Peak memory of the run."""
        return int(self.metrics["peak_memory_bytes"])

    def predicted_tokens(self, name: str) -> int:
        """Tokens that the perplexity on one evaluation set is a mean over."""
        return int(self.metrics["perplexity"][name]["tokens"])

    def perplexity(self, name: str, which: str = "pruned") -> float | None:
        """``pruned`` or ``dense`` perplexity on one evaluation set."""
        value = self.metrics["perplexity"][name][which]
        return None if value is None else float(value)

    def deviation(self, name: str) -> float | None:
        """Standard deviation of ``perplexity`` where this stands for several runs (``Repeats.mean_run``), else None."""
        value = self.metrics["perplexity"][name].get("deviation")
        return None if value is None else float(value)

    def unigram_perplexity(self, name: str) -> float | None:
        """Perplexity of token frequencies without context on one evaluation set, None where it is not recorded."""
        value = self.evaluation.get(name, {}).get("unigram_perplexity")
        return None if value is None else float(value)

    def verdict(self, name: str) -> str:
        """One word of ``reporting.verdict``'s scale, for one evaluation set."""
        return verdict_word(self.perplexity(name), self.perplexity(name, "dense"), self.unigram_perplexity(name))


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
        options=_options(folder),
        recovery=None if run.recovery is None else as_dict(run.recovery),
    )


def _options(folder: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(RunFolder.read_config(folder, "--runs"))
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"--runs: '{folder / 'config.yaml'}' is not YAML ({problem}).") from None
    model = found.get("model") if isinstance(found, dict) else None
    options = model.get("init_args") if isinstance(model, dict) else None
    return options if isinstance(options, dict) else {}
