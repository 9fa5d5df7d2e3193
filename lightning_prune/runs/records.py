"""The JSON files of a run folder as types. What is written is checked as strictly as what is read."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
PerplexityValue = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Open(BaseModel):
    """A record that others may add facts to."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Parameters(_Record):
    """Unique elements (tied weights once)."""

    dense: Annotated[Count, Field(ge=1)]
    pruned: Count

    @model_validator(mode="after")
    def _nothing_is_added(self) -> "Parameters":
        if self.pruned > self.dense:
            raise ValueError(f"pruned at most dense, {self.dense}")
        return self


class Ratio(_Record):
    """Shares of all parameters; ``requested`` is None where a number of layers was asked for."""

    requested: Share | None
    achieved: Share


class Perplexities(_Record):
    """On one evaluation set; None stands for a value that was not finite. ``tokens`` counts predicted tokens."""

    dense: PerplexityValue | None
    pruned: PerplexityValue | None
    tokens: Count


class Perplexity(_Record):
    perplexity: PerplexityValue | None
    tokens: Count


class _Text(_Open):
    """Where tokens came from; None where nobody knows, as of a token array."""

    dataset: str
    configuration: str | None
    split: str
    revision: str | None
    text_sha256: str | None
    tokenizer_sha256: str | None


class EvaluationManifest(_Text):
    """The protocol of one evaluation set."""

    seq_len: Count
    stride: Count
    bos: str
    windows: Count
    predicted_tokens: Count
    fingerprint: str
    unigram_perplexity: PerplexityValue | None = None


class System(_Open):
    """What was run. ``measured_seconds`` are the phases of the run whose scores were decided from again."""

    name: str
    label: str
    base_model: str
    base_model_sha256: str | None = None
    scores_reused: bool = False
    measured_seconds: dict[str, Seconds] = {}


class RunMetrics(_Open):
    """``metrics.json`` of a pruning run. ``seconds`` is wall-clock time by phase."""

    perplexity: dict[str, Perplexities]
    evaluation: dict[str, EvaluationManifest]
    parameters: Parameters
    pruning_ratio: Ratio
    seconds: dict[str, Seconds]
    peak_memory_bytes: Count
    method: System
    configuration_sha256: str | None = None

    @model_validator(mode="after")
    def _every_set_has_its_protocol(self) -> "RunMetrics":
        if self.perplexity.keys() != self.evaluation.keys():
            raise ValueError("perplexity and evaluation with the same sets")
        return self


class EvaluationMetrics(_Open):
    """``metrics.json`` of a ``test`` run."""

    perplexity: dict[str, Perplexity]
    evaluation: dict[str, EvaluationManifest]
    parameters: Count
    seconds: dict[str, Seconds]
    peak_memory_bytes: Count
    model: str


class Cpu(_Open):
    name: str
    cores: int | None
    threads: int


class Gpu(_Open):
    name: str
    memory_bytes: Count


class Environment(_Open):
    """``environment.json``: software versions, hardware, precision."""

    python: str
    packages: dict[str, str | None]
    platform: str
    cpu: Cpu
    memory_bytes: Count
    gpus: list[Gpu]
    cuda: str | None
    device: str
    precision: str
    command: list[str]


class NoCalibration(_Record):
    """``calibration.json`` of a method that reads no data."""

    dataset: None
    note: str = ""


class Calibration(_Text):
    """``calibration.json``: the manifest of the calibration set, see ``data.calibration.CalibrationManifest``."""

    sampling: Literal["random", "sequential", "sliding", "given"]
    stride: Count | None
    seed: int | None
    num_samples: Count
    seq_len: Count
    fingerprint: str


class Priors(_Open):
    """Measured block priors: one number per layer for every piece, None where it was not measured."""

    delta: dict[str, list[float | None]] | None = None


class MethodDetails(_Open):
    """``method.json``: what the method measured and chose beside its scores."""

    method: str
    label: str
    measured_by: str | None = None
    prior: Priors | None = None
    zeroed_weights: Count | None = None


class TrainingText(_Text):
    """What a recovery trained on: windows of ``seq_len`` tokens, the held-out ones not counted in ``windows``."""

    seq_len: Count
    windows: Count
    held_out_windows: Count
    seed: Count
    fingerprint: str


class HeldOutLoss(_Record):
    """Nats per token on the held-out share of the training text; ``after`` is of the state that was kept."""

    before: float
    after: float


class Recovered(_Open):
    """``recovery.json`` of a run that trained a pruned model.

    ``parent`` is the folder of the run that pruned, ``perplexity`` that run's pruned model on every evaluation set.
    ``tokens_seen`` and ``seconds`` are those of all training, also of what came after the state that was kept.
    """

    parent: str
    parent_label: str
    train: Literal["lora", "all"]
    teacher: str | None
    precision: str
    trainable_parameters: Count
    steps: Count
    tokens_seen: Count
    seconds: Seconds
    stopped_by: Literal["epochs", "steps", "time", "held-out loss"]
    held_out_loss: HeldOutLoss
    perplexity: dict[str, PerplexityValue | None]
    zeroed_weights: Count | None
    text: TrainingText


def as_dict(record: BaseModel) -> dict[str, Any]:
    """The record as it stands in the file, with the facts that others added."""
    return record.model_dump(mode="json", exclude_unset=True)
