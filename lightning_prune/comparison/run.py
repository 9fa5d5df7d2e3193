"""One finished run as the comparison sees it. Reads files only: no torch, no Lightning."""

import csv
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_prune.errors import UserError
from lightning_prune.reporting.verdict import verdict_word

REQUIRED = ("metrics.json", "calibration.json", "environment.json", "method.json", "plan.json", "scores.csv")


@dataclass(frozen=True)
class UnitTable:
    """``scores.csv`` as columns of U prunable units; ``block`` is ``attention``, ``mlp`` or ``layer``."""

    layer: NDArray[np.int64]
    block: NDArray[np.str_]
    unit: NDArray[np.int64]
    cost: NDArray[np.int64]
    importance: NDArray[np.float64]
    score: NDArray[np.float64]
    kept: NDArray[np.bool_]

    @property
    def num_layers(self) -> int:
        """Decoder layers of the dense model."""
        return int(self.layer.max()) + 1

    @property
    def whole_layers(self) -> bool:
        """Whether the units are decoder layers (depth pruning)."""
        return bool((self.block == "layer").all())

    def per_layer(self, values: NDArray[Any], block: str | None = None) -> NDArray[np.float64]:
        """Sums of ``values`` ``[U]`` per layer ``[L]``, of one block or of all."""
        rows = slice(None) if block is None else self.block == block
        return np.bincount(self.layer[rows], weights=values[rows], minlength=self.num_layers).astype(np.float64)


@dataclass(frozen=True)
class Run:
    """One run folder. ``calibration`` is None for methods that read no data; perplexities may be None (not finite)."""

    folder: Path
    label: str
    metrics: dict[str, Any]
    calibration: dict[str, Any] | None
    environment: dict[str, Any]
    details: dict[str, Any]

    @property
    def requested(self) -> float:
        """The pruning ratio asked for."""
        return float(self.metrics["pruning_ratio"]["requested"])

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

    @cached_property
    def units(self) -> UnitTable:
        """The score table."""
        return _units(self.folder / "scores.csv")

    def perplexity(self, name: str, which: str = "pruned") -> float | None:
        """``pruned`` or ``dense`` perplexity on one evaluation set."""
        value = self.metrics["perplexity"][name][which]
        return None if value is None else float(value)

    def unigram_perplexity(self, name: str) -> float | None:
        """Perplexity of token frequencies without context on one evaluation set, None where it is not recorded."""
        value = self.evaluation.get(name, {}).get("unigram_perplexity")
        return None if value is None else float(value)

    def verdict(self, name: str) -> str:
        """One word of ``reporting.verdict``'s scale, for one evaluation set."""
        return verdict_word(self.perplexity(name), self.perplexity(name, "dense"), self.unigram_perplexity(name))


def load_run(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        UserError: not the folder of a finished pruning run.
    """
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"--runs: '{folder}' is no finished pruning run, {missing[0]} is missing. Give folders that "
            f"'lightning-prune fit' or 'lightning-prune compare' wrote, such as logs/*/version_*."
        )
    try:
        read = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in REQUIRED[:4]}
        metrics, calibration = read["metrics.json"], read["calibration.json"]
        run = Run(
            folder=folder,
            label=str(metrics["method"]["label"]),
            metrics=metrics,
            calibration=calibration if calibration.get("dataset") is not None else None,
            environment=read["environment.json"],
            details=read["method.json"],
        )
        _ = run.requested, run.achieved, run.seconds, metrics["parameters"]["dense"], metrics["perplexity"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--runs: '{folder}' cannot be read as a pruning run ({type(error).__name__}: {error})."
        ) from None
    return run


def is_finished(folder: Path) -> bool:
    """Whether ``folder`` holds a whole pruning run (``metrics.json`` is written last)."""
    return all((folder / name).is_file() for name in REQUIRED)


def _units(path: Path) -> UnitTable:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        table = UnitTable(
            layer=np.array([int(row["layer"]) for row in rows]),
            block=np.array([row["block"] for row in rows]),
            unit=np.array([int(row["unit"]) for row in rows]),
            cost=np.array([int(row["cost"]) for row in rows]),
            importance=np.array([float(row["importance"]) for row in rows]),
            score=np.array([float(row["score"]) for row in rows]),
            kept=np.array([row["pruned"] == "0" for row in rows]),
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--runs: '{path}' is not a score table ({type(error).__name__}: {error}).") from None
    if not rows:
        raise UserError(f"--runs: '{path}' is an empty score table.")
    return table
