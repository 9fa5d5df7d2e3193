"""May these runs be in one table? Pure functions over run records: what differs, and which runs are alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_prune.comparison.records import Run
from lightning_prune.comparison.selection import largest_unit, removes_layers
from lightning_prune.runs.records import Calibration

SEED, TOKENS = "calibration seed", "calibration tokens (fingerprint)"
RATIO_TOLERANCE = 0.01  # of all parameters; what rounding to whole units cannot exceed in any real model
Drawn = tuple[Any, Any]  # a seed and the fingerprint of the tokens it drew
Facts = Callable[[Run], dict[str, Any]]
CALIBRATION_FACTS = {
    "calibration dataset": "dataset",
    "calibration configuration": "configuration",
    "calibration split": "split",
    "calibration revision": "revision",
    "calibration text": "text_sha256",
    "calibration tokenizer": "tokenizer_sha256",
    "calibration sampling": "sampling",
    "calibration stride": "stride",
    SEED: "seed",
    "calibration samples": "num_samples",
    "calibration sequence length": "seq_len",
    TOKENS: "fingerprint",
}
EVALUATION_FACTS = {
    "text": "text_sha256",
    "tokenizer": "tokenizer_sha256",
    "sequence length": "seq_len",
    "stride": "stride",
    "BOS handling": "bos",
    "tokens (fingerprint)": "fingerprint",
}
# What keeps nobody apart, but is worth a note.
SOFT_FACTS: dict[str, Callable[[Run], str | None]] = {
    "device": lambda run: run.environment.device,
    "torch version": lambda run: run.environment.packages.get("torch"),
    "transformers version": lambda run: run.environment.packages.get("transformers"),
    "lightning-prune version": lambda run: run.environment.packages.get("lightning-prune"),
}


@dataclass(frozen=True)
class Difference:
    """One fact on which runs disagree: the runs by value."""

    what: str
    values: dict[str, list[Run]]
    remark: str = ""

    def __str__(self) -> str:
        parts = [f"{value} in {run_names(runs)}" for value, runs in self.values.items()]
        return f"{self.what}: " + "; ".join(parts) + (f" ({self.remark})" if self.remark else "")


@dataclass(frozen=True)
class Group:
    """Runs that may share a table: same base model, tokenizer, precision, evaluation and calibration tokens.

    ``runs`` reached the ratio requested; ``other_ratio`` did not and are kept apart within the group.
    """

    runs: list[Run]
    other_ratio: list[Run]

    @property
    def all(self) -> list[Run]:
        """Both kinds."""
        return self.runs + self.other_ratio

    @property
    def calibration(self) -> Calibration | None:
        """The manifest of its calibration set, of the first run that had one; None where none did."""
        return next((run.calibration for run in self.all if run.calibration is not None), None)


@dataclass(frozen=True)
class Audit:
    """Groups, largest first; every difference between any two runs; notes that keep nobody apart."""

    groups: list[Group]
    differences: list[Difference]
    notes: list[str]

    @property
    def fair(self) -> bool:
        """Whether all runs may be in one table."""
        return not self.differences

    @property
    def runs(self) -> list[Run]:
        """Those of all groups."""
        return [run for group in self.groups for run in group.all]


def audit(runs: Sequence[Run], tolerance: float = RATIO_TOLERANCE) -> Audit:
    """Compare the facts of all runs.

    Args:
        runs: finished runs; their order is kept inside groups.
        tolerance: how far, in shares of all parameters, an achieved ratio may be from the requested one.
    """
    repeated = _joined(runs)

    def of(run: Run) -> dict[str, Any]:
        return facts(run) | repeated.get(run, {})

    differences = _differences(runs, of)
    off = [run for run in runs if abs(run.achieved - run.requested) > tolerance]
    if off:
        differences.append(_ratio_difference(off, tolerance))
        # A system that missed the ratio with one seed is kept apart with all of them.
        missed = {(run.label, run.requested) for run in off}
        off += [run for run in repeated if run not in off and (run.label, run.requested) in missed]
    notes = [
        f"Calibration seeds {both}: meant as repetitions, for every system of the table had each of them, and within a "
        "seed all had the same tokens."
        for both in dict.fromkeys(one[SEED] for one in repeated.values())
    ]
    return Audit(_groups(runs, off, of), differences, notes + _notes(runs))


def facts(run: Run) -> dict[str, Any]:
    """Everything that must agree before two perplexities may be compared; calibration only where there was one.
    Several seeds that are meant as repetitions are joined by ``audit``."""
    found = protocol(run)
    if run.calibration is not None:
        # Of token ids that were given, the fingerprint says all; the file they came in may be a temporary one.
        unsaid = "dataset" if run.calibration.sampling == "given" else None
        for what, key in CALIBRATION_FACTS.items():
            if key != unsaid:
                found[what] = _short(getattr(run.calibration, key))
    return found


def protocol(run: Run) -> dict[str, Any]:
    """The facts of a run but for its calibration."""
    parameters, weights = run.metrics.parameters, run.metrics.method.base_model_sha256
    # Masks leave every parameter where it is, so their ratio is not that of a smaller model.
    removed = abs(1 - parameters.pruned / parameters.dense - run.achieved) < 0.001
    found: dict[str, Any] = {
        # The same weights under another path are the same model; without a fingerprint only the name is left.
        "base model": _short(weights) if weights else run.metrics.method.base_model,
        "parameters of the base model": f"{parameters.dense:,}",
        "what the ratio counts": "parameters removed" if removed else "weights set to zero",
        "precision": run.environment.precision,
        "evaluation sets": ", ".join(sorted(run.metrics.evaluation)) or "none",
    }
    for name, manifest in sorted(run.metrics.evaluation.items()):
        for what, key in EVALUATION_FACTS.items():
            found[f"evaluation {what} of {name}"] = _short(getattr(manifest, key))
    return found


def _joined(runs: Sequence[Run]) -> dict[Run, dict[str, Any]]:
    """The two facts ``SEED`` and ``TOKENS`` of every run whose seed was joined with others, as repetitions that are
    meant.

    Seeds are joined where everything else agrees, and where at every ratio that both have the same systems ran: so
    means are over the same seeds for all, and within a seed all had the same tokens. A seed that some system lacks
    stays apart.
    """
    families: dict[str, dict[Drawn, list[Run]]] = {}
    for run in runs:
        if run.seed is not None:
            mine = facts(run)
            drawn = (mine.pop(SEED), mine.pop(TOKENS))
            families.setdefault(repr(mine), {}).setdefault(drawn, []).append(run)
    told: dict[Run, dict[str, Any]] = {}
    for draws in families.values():
        clusters: list[list[Drawn]] = []
        for drawn in sorted(draws, key=lambda drawn: (-len(draws[drawn]), drawn[0])):
            fits = [one for one in clusters if all(_may_join(drawn, other, draws) for other in one)]
            if not fits:
                clusters.append([drawn])
            else:
                fits[0].append(drawn)
        for cluster in clusters:
            if len(cluster) > 1:
                cluster.sort(key=lambda drawn: int(drawn[0]))
                fact = {SEED: ", ".join(str(seed) for seed, _ in cluster), TOKENS: ", ".join(t for _, t in cluster)}
                told |= {run: fact for drawn in cluster for run in draws[drawn]}
    return told


def _may_join(one: Drawn, other: Drawn, draws: dict[Drawn, list[Run]]) -> bool:
    if one[0] == other[0] or one[1] == other[1]:
        return False
    left, right = _systems(draws[one]), _systems(draws[other])
    common = left.keys() & right.keys()
    return bool(common) and all(left[ratio] == right[ratio] for ratio in common)


def _systems(runs: Sequence[Run]) -> dict[float, set[str]]:
    systems: dict[float, set[str]] = {}
    for run in runs:
        systems.setdefault(run.requested, set()).add(run.label)
    return systems


def run_names(runs: Sequence[Run]) -> str:
    """How runs are called in messages: label, folder and ratio."""
    return ", ".join(f"{run.label}/{run.folder.name} {run.requested:g}" for run in runs)


def _by_value(runs: Sequence[Run], read: Callable[[Run], Any]) -> dict[str, list[Run]]:
    values: dict[str, list[Run]] = {}
    for run in runs:
        values.setdefault(str(read(run)), []).append(run)
    return values


def _differences(runs: Sequence[Run], facts: Facts) -> list[Difference]:
    by_fact: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        for what, value in facts(run).items():
            by_fact.setdefault(what, {}).setdefault(str(value), []).append(run)
    names = ", ".join(f"'{name}'" for name in sorted({run.metrics.method.base_model for run in runs}))
    remarks = {"base model": f"weight fingerprints or names; called {names}"}
    return [Difference(what, values, remarks.get(what, "")) for what, values in by_fact.items() if len(values) > 1]


def _ratio_difference(off: Sequence[Run], tolerance: float) -> Difference:
    remark = f"more than {tolerance:g} apart"
    layered = [run for run in off if removes_layers(run)]
    if layered:
        labels = ", ".join(sorted({run.label for run in layered}))
        remark += f"; {labels}: removes whole layers, one layer is {largest_unit(layered[0]):.4f} of the model"
    values = _by_value(off, lambda run: f"{run.achieved:.4f} instead of {run.requested:g}")
    return Difference("achieved ratio", values, remark)


def _groups(runs: Sequence[Run], off: Sequence[Run], facts: Facts) -> list[Group]:
    keyed = _by_value([run for run in runs if run.calibration is not None], lambda run: repr(facts(run)))
    ordered = sorted(keyed.values(), key=len, reverse=True)
    # A method without data joins the largest group that shares everything else; else its own kind.
    for run in runs:
        if run.calibration is None:
            same = [group for group in ordered if protocol(group[0]) == protocol(run)]
            if same:
                same[0].append(run)
            else:
                ordered.append([run])
    position = {run: index for index, run in enumerate(runs)}
    groups: list[Group] = []
    for members in ordered:
        members.sort(key=position.__getitem__)
        groups.append(Group([run for run in members if run not in off], [run for run in members if run in off]))
    return groups


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    free = sorted({run.label for run in runs if run.calibration is None})
    if free:
        notes.append(f"{', '.join(free)}: needs no calibration, so the calibration set cannot differ.")
    extra = [(run.label, (run.details.model_extra or {}).get("note")) for run in runs]
    notes += [f"{label}: {note}" for label, note in sorted({(label, str(note)) for label, note in extra if note})]
    unknown = [run for run in runs if run.metrics.method.base_model_sha256 is None]
    if unknown:
        names = run_names(unknown)
        notes.append(f"No weight fingerprint was recorded in {names}; the base model is known by name only.")
    for what, read in SOFT_FACTS.items():
        values = _by_value(runs, read)
        if len(values) > 1:
            notes.append(f"{Difference(what, values)}. Perplexities may differ in the last digits, seconds do.")
    return notes


def _short(value: Any) -> Any:
    if value is None:
        return "none"
    return value[:12] if isinstance(value, str) and len(value) == 64 else value
