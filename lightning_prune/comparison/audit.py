"""May these runs stand in one table? Pure functions over run records: what differs, and which runs are alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_prune.comparison.run import Run
from lightning_prune.comparison.seeds import SEED, TOKENS, joined

RATIO_TOLERANCE = 0.01  # of all parameters; what rounding to whole units cannot exceed in any real model
RATIO_FACT = "achieved ratio"
Facts = Callable[[Run], dict[str, Any]]
CALIBRATION_FACTS = (
    ("calibration dataset", "dataset"),
    ("calibration configuration", "configuration"),
    ("calibration split", "split"),
    ("calibration revision", "revision"),
    ("calibration text", "text_sha256"),
    ("calibration tokenizer", "tokenizer_sha256"),
    ("calibration sampling", "sampling"),
    ("calibration stride", "stride"),
    (SEED, "seed"),
    ("calibration samples", "num_samples"),
    ("calibration sequence length", "seq_len"),
    (TOKENS, "fingerprint"),
)
EVALUATION_FACTS = (
    ("text", "text_sha256"),
    ("tokenizer", "tokenizer_sha256"),
    ("sequence length", "seq_len"),
    ("stride", "stride"),
    ("BOS handling", "bos"),
    ("tokens (fingerprint)", "fingerprint"),
)


@dataclass(frozen=True)
class Difference:
    """One fact on which runs disagree: the runs behind every value."""

    what: str
    values: dict[str, list[Run]]
    remark: str = ""

    def __str__(self) -> str:
        parts = [f"{value} in {_names(runs)}" for value, runs in self.values.items()]
        return f"{self.what}: " + "; ".join(parts) + (f" ({self.remark})" if self.remark else "")


@dataclass(frozen=True)
class Group:
    """Runs that may share a table: same base model, tokenizer, precision, evaluation and calibration tokens.

    ``runs`` reached the ratio they were asked for; ``other_ratio`` did not and stand apart within the group.
    ``differs`` names what separates the group from the first one.
    """

    runs: list[Run]
    other_ratio: list[Run]
    differs: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[Run]:
        """Both kinds."""
        return self.runs + self.other_ratio

    @property
    def calibration(self) -> Mapping[str, Any] | None:
        """The manifest of its calibration set, of the first run that had one; None where none did."""
        return next((run.calibration for run in self.all if run.calibration is not None), None)


@dataclass(frozen=True)
class Audit:
    """Groups, largest first; every difference between any two runs; remarks that keep nobody apart."""

    groups: list[Group]
    differences: list[Difference]
    notes: list[str]

    @property
    def fair(self) -> bool:
        """Whether all runs may stand in one table."""
        return not self.differences


def audit(runs: Sequence[Run], tolerance: float = RATIO_TOLERANCE) -> Audit:
    """Compare the facts of all runs.

    Args:
        runs: finished runs; their order is kept inside groups.
        tolerance: how far, in shares of all parameters, an achieved ratio may lie from the requested one.
    """
    seeds = joined(runs, facts)

    def told(run: Run) -> dict[str, Any]:
        return facts(run) | seeds.get(id(run), {})

    differences = _differences(runs, told)
    off = [run for run in runs if abs(run.achieved - run.requested) > tolerance]
    if off:
        differences.append(_ratio_difference(off, tolerance))
        # A system that missed the ratio with one seed stands apart with all of them.
        missed = {(run.label, run.requested) for run in off}
        again = [run for run in runs if id(run) in seeds and (run.label, run.requested) in missed]
        off += [run for run in again if not any(run is other for other in off)]
    notes = [
        f"Calibration seeds {both}: meant as repetitions, for every system of the table had each of them, and within a "
        "seed all had the same tokens."
        for both in dict.fromkeys(one[SEED] for one in seeds.values())
    ]
    return Audit(_groups(runs, off, told), differences, notes + _notes(runs))


def run_name(run: Run) -> str:
    """How a run is called in messages: label, ratio and folder."""
    return f"{run.label} {run.requested:g} ({run.folder})"


def facts(run: Run) -> dict[str, Any]:
    """Everything that must agree before two perplexities may be compared; calibration only where there was one.
    Several seeds that are meant as repetitions are joined by ``audit``."""
    return protocol(run) | calibration_facts(run)


def protocol(run: Run) -> dict[str, Any]:
    """The facts of a run but for its calibration."""
    weights = run.base_model_sha256
    found: dict[str, Any] = {
        # The same weights under another path are the same model; without a fingerprint only the name is left.
        "base model": _short(weights) if weights else run.base_model,
        "parameters of the base model": f"{run.dense_parameters:,}",
        "what the ratio counts": _counted(run),
        "precision": run.environment.get("precision"),
        "evaluation sets": ", ".join(sorted(run.evaluation)) or "none",
    }
    for name, manifest in sorted(run.evaluation.items()):
        for what, key in EVALUATION_FACTS:
            found[f"evaluation {what} of {name}"] = _short(manifest.get(key))
    return found


def calibration_facts(run: Run) -> dict[str, Any]:
    """The calibration set of a run; empty for methods that read no data."""
    if run.calibration is None:
        return {}
    # Of token ids that were given, the fingerprint says all; the file they came in may be a temporary one.
    unsaid = "dataset" if run.calibration.get("sampling") == "given" else None
    return {what: _short(run.calibration.get(key)) for what, key in CALIBRATION_FACTS if key != unsaid}


def _differences(runs: Sequence[Run], facts: Facts) -> list[Difference]:
    found: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        for what, value in facts(run).items():
            found.setdefault(what, {}).setdefault(str(value), []).append(run)
    differences = []
    for what, values in found.items():
        if len(values) > 1:
            remark = ""
            if what == "base model":
                names = sorted({run.base_model for group in values.values() for run in group})
                remark = "weight fingerprints or names; called " + ", ".join(f"'{name}'" for name in names)
            differences.append(Difference(what, values, remark))
    return differences


def _ratio_difference(off: list[Run], tolerance: float) -> Difference:
    values: dict[str, list[Run]] = {}
    for run in off:
        values.setdefault(f"{run.achieved:.4f} instead of {run.requested:g}", []).append(run)
    remark = f"more than {tolerance:g} apart"
    layered = [run for run in off if run.units.whole_layers]
    if layered:
        share = float(layered[0].units.cost.max()) / layered[0].dense_parameters
        labels = ", ".join(sorted({run.label for run in layered}))
        remark += f"; {labels}: removes whole layers, one layer is {share:.4f} of the model"
    return Difference(RATIO_FACT, values, remark)


def _groups(runs: Sequence[Run], off: list[Run], facts: Facts) -> list[Group]:
    keyed: dict[str, list[Run]] = {}
    free: list[Run] = []
    for run in runs:
        if run.calibration is None:
            free.append(run)
        else:
            keyed.setdefault(_key(run, facts), []).append(run)
    ordered = sorted(keyed.values(), key=len, reverse=True)
    # A method without data stands with the largest group that shares everything else; else with its own kind.
    for run in free:
        same = [group for group in ordered if _key(group[0], protocol) == _key(run, protocol)]
        if same:
            same[0].append(run)
        else:
            ordered.append([run])
    position = {id(run): index for index, run in enumerate(runs)}
    groups: list[Group] = []
    for members in ordered:
        members.sort(key=lambda run: position[id(run)])
        apart = [run for run in members if any(run is other for other in off)]
        near = [run for run in members if not any(run is other for other in off)]
        groups.append(Group(near, apart, [] if not groups else _against(groups[0].all, members, facts)))
    return groups


def _against(first: list[Run], other: list[Run], facts: Facts) -> list[str]:
    reference = next((run for run in first if run.calibration is not None), first[0])
    mine = next((run for run in other if run.calibration is not None), other[0])
    left, right = facts(reference), facts(mine)
    return [
        f"{what}: {right.get(what, 'none')} instead of {left.get(what, 'none')}"
        for what in dict.fromkeys([*left, *right])
        if left.get(what) != right.get(what) and (what in right or mine.calibration is not None)
    ]


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    free = sorted({run.label for run in runs if run.calibration is None})
    if free:
        notes.append(f"{', '.join(free)}: needs no calibration, so the calibration set cannot differ.")
    said = sorted({(run.label, str(run.details["note"])) for run in runs if run.details.get("note")})
    notes += [f"{label}: {text}" for label, text in said]
    unknown = [run for run in runs if run.base_model_sha256 is None]
    if unknown:
        notes.append(f"No weight fingerprint was recorded in {_names(unknown)}; the base model is known by name only.")
    for what, read in _SOFT_FACTS.items():
        values: dict[str, list[Run]] = {}
        for run in runs:
            values.setdefault(str(read(run)), []).append(run)
        if len(values) > 1:
            notes.append(str(Difference(what, values)) + ". Perplexities may differ in the last digits, seconds do.")
    return notes


_SOFT_FACTS: dict[str, Callable[[Run], Any]] = {
    "device": lambda run: run.environment.get("device"),
    "torch version": lambda run: run.environment.get("packages", {}).get("torch"),
    "transformers version": lambda run: run.environment.get("packages", {}).get("transformers"),
    "lightning-prune version": lambda run: run.environment.get("packages", {}).get("lightning-prune"),
}


def _key(run: Run, of: Facts) -> str:
    return repr(of(run))


def _names(runs: list[Run]) -> str:
    if len(runs) <= 2:
        return ", ".join(run_name(run) for run in runs)
    ratios: dict[str, list[str]] = {}
    for run in runs:
        ratios.setdefault(run.label, []).append(f"{run.requested:g}")
    return ", ".join(f"{label} {'/'.join(values)}" for label, values in ratios.items())


def _counted(run: Run) -> str:
    """Masks leave every parameter where it is, so their ratio is not that of a smaller model."""
    gone = 1 - run.pruned_parameters / run.dense_parameters
    return "parameters removed" if abs(gone - run.achieved) < 0.001 else "weights set to zero"


def _short(value: Any) -> Any:
    if value is None:
        return "none"
    return value[:12] if isinstance(value, str) and len(value) == 64 else value
