"""The JSON files of a run folder as types. What is written is checked as strictly as what is read."""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
PerplexityValue = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Open(BaseModel):  # a record that others may add facts to
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Parameters(_Record):
    """Unique elements (tied weights once); ``active`` those that one token passes, where there are experts."""

    dense: Annotated[Count, Field(ge=1)]
    pruned: Count
    dense_active: Count | None = None
    pruned_active: Count | None = None

    @model_validator(mode="after")
    def _nothing_is_added(self) -> "Parameters":
        if self.pruned > self.dense:
            raise ValueError(f"pruned at most dense, {self.dense}")
        return self


class Ratio(_Record):
    """Shares of all parameters; ``requested`` is None where a number of layers was requested."""

    requested: Share | None
    achieved: Share


class Perplexities(_Record):
    """Perplexities on one evaluation set; None is a value that was not finite. ``tokens`` counts predicted tokens."""

    dense: PerplexityValue | None
    pruned: PerplexityValue | None
    tokens: Count


class DistanceFacts(_Record):
    """Means over the predicted tokens of one evaluation set, see ``evaluation.distance``; None is not finite."""

    kl_divergence: Annotated[float, Field(ge=0)] | None
    top1_agreement: Share | None
    expected_acceptance: Share | None


class Written(_Record):
    """Shares of one model's continuations; None where they are shorter than four tokens."""

    repeated_4grams: Share | None
    ended: Share


class Example(_Record):
    """A prompt and both continuations, as text."""

    prompt: str
    dense: str
    pruned: str


class ContinuationFacts(_Record):
    """Facts on both models' continuations of the prompts; ``common_beginning``: mean number of equal first tokens."""

    evaluation_set: str
    prompts: Count
    prompt_tokens: Count
    new_tokens: Count
    common_beginning: Annotated[float, Field(ge=0)]
    dense: Written
    pruned: Written
    examples: list[Example]


class _Text(_Open):
    """The text that tokens came from; None for a fact that is not known, as of a token array."""

    dataset: str
    configuration: str | None
    split: str
    revision: str | None
    text_sha256: str | None
    tokenizer_sha256: str | None
    bos: str = "none"  # before it was a choice, windows never began with the token
    rendering: str | None = None
    chat_template_sha256: str | None = None


class EvaluationManifest(_Text):
    """The protocol of one evaluation set."""

    seq_len: Count
    stride: Count
    windows: Count
    predicted_tokens: Count
    fingerprint: str
    unigram_perplexity: PerplexityValue | None = None
    long_windows_of: str | None = None  # the set whose text this is again, in longer windows
    calibration_overlap: Annotated[float, Field(ge=0, le=1)] | None = None  # share of the samples that are from here


class System(_Open):
    """The system that was run. ``measured_seconds``: by phase, of the run whose scores were used for a new decision."""

    name: str
    label: str
    base_model: str
    base_model_sha256: str | None = None
    history: str = ""  # of a base model that was pruned before
    scores_reused: bool = False
    measured_seconds: dict[str, Seconds] = {}


class Serving(_Record):
    """Numbers of devices over which the model can be split, and a sentence on runtimes that misread it, if any."""

    tensor_parallel: list[Count]
    note: str


class Footprint(_Record):
    """Footprint of one model: weight files, memory of weights and KV cache by context, operations per token."""

    file_bytes: Count
    memory_bytes: dict[int, Count]
    flops_per_token: Count


class TargetFacts(_Record):
    """The requested size: parameters, or bytes with the KV cache of ``batch`` × ``context`` tokens and with those
    ``beside`` the text model."""

    kind: Literal["parameters", "active_parameters", "memory"]
    limit: Count
    reached: Count
    context: Count
    batch: Count
    beside: Count = 0


class RunMetrics(_Open):
    """``metrics.json`` of a pruning run; fields with a default are missing in runs of earlier versions."""

    perplexity: dict[str, Perplexities]
    distance: dict[str, DistanceFacts] = {}
    continuations: ContinuationFacts | None = None
    serving: Serving | None = None
    evaluation: dict[str, EvaluationManifest]
    parameters: Parameters
    footprint: dict[Literal["dense", "pruned"], Footprint] | None = None
    pruning_ratio: Ratio
    target: TargetFacts | None = None
    seconds: dict[str, Seconds]
    peak_memory_bytes: Count
    method: System
    configuration_sha256: str | None = None

    @model_validator(mode="after")
    def _every_set_has_its_protocol(self) -> "RunMetrics":
        if self.perplexity.keys() != self.evaluation.keys():
            raise ValueError("perplexity and evaluation with the same sets")
        if self.distance.keys() - self.perplexity.keys():
            raise ValueError("distance of sets that have a perplexity")
        return self


class Environment(_Open):
    """``environment.json``: software versions, hardware, precision."""

    python: str
    packages: dict[str, str | None]
    platform: str
    cpu: dict[str, str | int | None]
    memory_bytes: Count
    gpus: list[dict[str, str | int]]
    cuda: str | None
    device: str
    precision: str
    command: list[str]


class NoCalibration(_Record):
    """``calibration.json`` of a method that reads no data."""

    dataset: None
    note: str = ""


class Calibration(_Text):
    """``calibration.json``, see ``data.calibration.CalibrationManifest``."""

    sampling: Literal["random", "sequential", "sliding", "given"]
    stride: Count | None
    seed: int | None
    num_samples: Count
    seq_len: Count
    fingerprint: str
    parts: list[dict[str, Any]] | None = None  # of a mixture


class ExpertFacts(_Open):
    """Tokens of every expert by layer, the fewest of one, and the super experts as layer and expert."""

    tokens: dict[int, list[Count]]
    fewest_tokens: Count
    super_experts: list[tuple[Count, Count]]


class MethodDetails(_Open):
    """``method.json``: what the method measured and chose beside its scores."""

    method: str
    label: str
    measured_by: str | None = None
    zeroed_weights: Count | None = None
    experts: ExpertFacts | None = None


class Recovered(_Open):
    """``recovery.json``. ``parent`` is the folder of the run that pruned, ``perplexity`` of its pruned model by set;
    ``tokens_seen`` and ``seconds`` are of all training, also of what came after the state that was kept."""

    parent: str
    parent_label: str
    tokens_seen: Count
    seconds: Seconds
    perplexity: dict[str, PerplexityValue | None]


def as_dict(record: BaseModel) -> dict[str, Any]:
    """The record as the file has it, with the facts that others added."""
    return record.model_dump(mode="json", exclude_unset=True)


class Failure(NamedTuple):
    """A run of an experiment that ended in an error, as reports list it."""

    label: str
    requested: float | str  # a ratio, or a target
    message: str
