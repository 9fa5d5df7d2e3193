"""May these runs be in one table? Pure functions over run records: what differs, and which runs are alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_prune.comparison.records import Run
from lightning_prune.data.calibration import SHARE, same_text
from lightning_prune.methods.target import SIZES
from lightning_prune.runs.records import Calibration, EvaluationManifest

SEED, TOKENS = "calibration seed", "calibration tokens (fingerprint)"
RATIO_TOLERANCE = 0.01  # of all parameters; what rounding to whole units cannot exceed in any real model
UNEQUAL = 0.002  # of all parameters; smaller differences in size are not worth a note
OF_THE_RUN = {"pretrained", "pruning_ratio", "label", *SIZES}  # options that do not make another system
Drawn = tuple[Any, Any]  # a seed and the fingerprint of the tokens it drew
Facts = dict[str, Any]
CALIBRATION_FACTS = {
    "calibration dataset": "dataset",
    "calibration configuration": "configuration",
    "calibration split": "split",
    "calibration revision": "revision",
    "calibration text": "text_sha256",
    "calibration tokenizer": "tokenizer_sha256",
    "calibration chat template": "chat_template_sha256",
    "calibration BOS handling": "bos",
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
    "chat template": "chat_template_sha256",
    "sequence length": "seq_len",
    "stride": "stride",
    "BOS handling": "bos",
    "tokens (fingerprint)": "fingerprint",
}


@dataclass(frozen=True)
class Difference:
    """One fact on which runs disagree: the runs by value."""

    what: str
    values: dict[str, list[Run]]
    remark: str = ""

    def named(self) -> dict[str, str]:
        """The runs by value, as text: label, folder and ratio, or paths where two would have the same name."""
        return _named(self.values)

    def __str__(self) -> str:
        parts = [f"{value} in {names}" for value, names in self.named().items()]
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
        """All runs of the group, whichever ratio they reached."""
        return self.runs + self.other_ratio

    @property
    def calibration(self) -> Calibration | None:
        """Calibration manifest of the first run that has one; None where none has."""
        return next((run.calibration for run in self.all if run.calibration is not None), None)


@dataclass(frozen=True)
class Audit:
    """Result of ``audit``: groups, largest first, differences between runs, and notes that keep no runs apart."""

    groups: list[Group]
    differences: list[Difference]
    notes: list[str]

    @property
    def runs(self) -> list[Run]:
        """All runs, group by group."""
        return [run for group in self.groups for run in group.all]


def audit(runs: Sequence[Run]) -> Audit:
    """Compare the facts of all ``runs``, whose order is kept inside groups."""
    repeated = _joined(runs)
    known = {run: facts(run) | repeated.get(run, {}) for run in runs}
    names = ", ".join(f"'{name}'" for name in sorted({run.metrics.method.base_model for run in runs}))
    differences = []
    for what in dict.fromkeys(what for mine in known.values() for what in mine):
        values = by_value({run: mine[what] for run, mine in known.items() if what in mine})
        if len(values) > 1:
            remark = f"weight fingerprints or names; called {names}" if what == "base model" else ""
            differences.append(Difference(what, values, remark))
    off = [run for run in runs if abs(run.achieved - run.requested) > RATIO_TOLERANCE]
    if off:
        remark = f"more than {RATIO_TOLERANCE:g} apart"
        if layered := [run for run in off if run.units.whole_layers]:
            labels = ", ".join(sorted({run.label for run in layered}))
            largest = layered[0].units.cost.max() / layered[0].metrics.parameters.dense
            remark += f"; {labels}: removes whole layers, one layer is {largest:.4f} of the model"
        values = by_value({run: f"{run.achieved:.4f} instead of {run.requested:g}" for run in off})
        differences.append(Difference("achieved ratio", values, remark))
        # A system that missed the ratio with one seed is kept apart with all of them.
        missed = {(run.label, run.size) for run in off}
        off += [run for run in repeated if run not in off and (run.label, run.size) in missed]
    notes = [
        f"Calibration seeds {both}: meant as repetitions, for every system of the table had each of them, and within a "
        "seed all had the same tokens."
        for both in dict.fromkeys(one[SEED] for one in repeated.values())
    ]
    return Audit(_groups(known, off), differences, notes + _notes(runs))


def facts(run: Run) -> Facts:
    """Everything that must agree before two perplexities may be compared; calibration only where there was one."""
    mine = protocol(run)
    if run.calibration is not None:
        # Of token ids that were given, the fingerprint says all; the file they came in may be a temporary one.
        unsaid = "dataset" if run.calibration.sampling == "given" else None
        for what, key in CALIBRATION_FACTS.items():
            if key != unsaid:
                mine[what] = _short(getattr(run.calibration, key))
        seen = [name for name, one in sorted(run.metrics.evaluation.items()) if was_seen(run, one)]
        mine["evaluation text that was calibrated on"] = ", ".join(seen) or "none"
    return mine


def protocol(run: Run) -> Facts:
    """The facts of a run but for its calibration."""
    parameters, weights = run.metrics.parameters, run.metrics.method.base_model_sha256
    # Masks leave every parameter where it is, so their ratio is not that of a smaller model.
    removed = abs(1 - parameters.pruned / parameters.dense - run.achieved) < 0.001
    # Long windows are the same texts again; earlier versions had none. What a run lacks is a gap in its line.
    own = {name: one for name, one in run.metrics.evaluation.items() if one.long_windows_of is None}
    mine: Facts = {
        # The same weights under another path are the same model; without a fingerprint only the name is left.
        "base model": _short(weights) if weights else run.metrics.method.base_model,
        "parameters of the base model": f"{parameters.dense:,}",
        "what the ratio counts": "parameters removed" if removed else "weights set to zero",
        "precision": run.environment.precision,
        "evaluation sets": ", ".join(sorted(own)) or "none",
    }
    for name, manifest in sorted(own.items()):
        for what, key in EVALUATION_FACTS.items():
            mine[f"evaluation {what} of {name}"] = _short(getattr(manifest, key))
    return mine


def _joined(runs: Sequence[Run]) -> dict[Run, Facts]:
    """The facts ``SEED`` and ``TOKENS`` of every run whose seed was joined with others, as repetitions that are meant.

    Seeds are joined where everything else agrees and the same systems ran at every ratio that both have, so that means
    are over the same seeds for all. A seed that some system lacks stays apart.
    """
    families: dict[str, dict[Drawn, list[Run]]] = {}
    for run in runs:
        if run.seed is not None:
            mine = facts(run)
            drawn = (mine.pop(SEED), mine.pop(TOKENS))
            families.setdefault(repr(mine), {}).setdefault(drawn, []).append(run)
    joined: dict[Run, Facts] = {}
    for draws in families.values():
        clusters: list[list[Drawn]] = []
        for drawn in sorted(draws, key=lambda drawn: (-len(draws[drawn]), drawn[0])):
            fits = [one for one in clusters if all(_may_join(drawn, other, draws) for other in one)]
            if fits:
                fits[0].append(drawn)
            else:
                clusters.append([drawn])
        for cluster in clusters:
            if len(cluster) > 1:
                cluster.sort(key=lambda drawn: int(drawn[0]))
                seeds, tokens = (", ".join(map(str, values)) for values in zip(*cluster, strict=True))
                joined |= {run: {SEED: seeds, TOKENS: tokens} for drawn in cluster for run in draws[drawn]}
    return joined


def _may_join(one: Drawn, other: Drawn, draws: dict[Drawn, list[Run]]) -> bool:
    if one[0] == other[0] or one[1] == other[1]:
        return False
    left, right = ({(run.size, run.label) for run in draws[drawn]} for drawn in (one, other))
    common = {size for size, _ in left} & {size for size, _ in right}
    return bool(common) and all(size not in common for size, _ in left ^ right)


def _named(having: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    names = [name for runs in having.values() for name in map(run_name, runs)]
    name = run_name if len(set(names)) == len(names) else _path
    return {key: ", ".join(map(name, runs)) for key, runs in having.items()}


def run_name(run: Run) -> str:
    """Name of a run in messages: label, folder and ratio."""
    return f"{run.label}/{run.folder.name} {run.size}"


def _path(run: Run) -> str:
    return f"{run.folder} {run.size}"


def by_value(of: Mapping[Run, Any]) -> dict[str, list[Run]]:
    """Group runs by their value: value → the runs that have it."""
    values: dict[str, list[Run]] = {}
    for run, value in of.items():
        values.setdefault(str(value), []).append(run)
    return values


def _groups(known: Mapping[Run, Facts], off: Sequence[Run]) -> list[Group]:
    alike = by_value({run: mine for run, mine in known.items() if run.calibration is not None})
    groups = sorted(alike.values(), key=len, reverse=True)
    # A method without data joins the largest group that shares everything else; else its own kind.
    for run in known:
        if run.calibration is None:
            same = [group for group in groups if protocol(group[0]) == protocol(run)]
            if same:
                same[0].append(run)
            else:
                groups.append([run])
    inside = [[run for run in known if run in members] for members in groups]  # in the order given
    return [
        Group([run for run in members if run not in off], [run for run in members if run in off]) for members in inside
    ]


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = [*not_held_out(runs), *_unlike(runs)]
    if free := sorted({run.label for run in runs if run.calibration is None}):
        notes.append(f"{', '.join(free)}: needs no calibration, so the calibration set cannot differ.")
    extra = [(run.label, (run.details.model_extra or {}).get("note")) for run in runs]
    notes += [f"{label}: {note}" for label, note in sorted({(label, str(note)) for label, note in extra if note})]
    soft = {"device": {run: run.environment.device for run in runs}}
    for package in ("torch", "transformers", "lightning-prune"):
        soft[f"{package} version"] = {run: str(run.environment.packages.get(package)) for run in runs}
    for what, of in _more(runs).items():
        if len(values := by_value(of)) > 1:
            notes.append(f"{Difference(what, values)}. What a run has not measured is a gap in the tables.")
    for what, of in soft.items():
        if len(values := by_value(of)) > 1:
            notes.append(f"{Difference(what, values)}. Perplexities may differ in the last digits, seconds do.")
    return notes


def not_held_out(runs: Sequence[Run]) -> list[str]:
    """A sentence per evaluation set that holds text which runs calibrated on."""
    seen: dict[str, list[Run]] = {}
    for run in runs:
        for name, one in run.metrics.evaluation.items():
            if was_seen(run, one):
                seen.setdefault(name, []).append(run)
    return [
        f"Not held out: {name} holds text that was calibrated on by {named}." for name, named in _named(seen).items()
    ]


def was_seen(run: Run, held_out: EvaluationManifest) -> bool:
    """Whether an evaluation set of a run holds text that it calibrated on."""
    if run.calibration is None:
        return False
    same = same_text(run.calibration.model_dump(), held_out.model_dump())
    return same or (held_out.calibration_overlap or 0) > SHARE


def _unlike(runs: Sequence[Run]) -> list[str]:
    """Systems of one name with other options, and sizes that differ by more than ``UNEQUAL`` within a ratio."""
    notes = []
    for label in dict.fromkeys(run.label for run in runs):
        here = [run for run in runs if run.label == label]
        for option in sorted(set.intersection(*(set(run.options) for run in here)) - OF_THE_RUN):
            values = by_value({run: run.options[option] for run in here})
            if len(values) > 1:
                notes.append(f"{label}: {Difference(option, values)}. They are one system with other options.")
    for size in dict.fromkeys(run.size for run in runs):
        here = sorted((run for run in runs if run.size == size), key=lambda run: run.achieved)
        least, most = here[0], here[-1]
        if (
            most.achieved - least.achieved > UNEQUAL
            and max(abs(run.achieved - run.requested) for run in here) <= RATIO_TOLERANCE
        ):
            notes.append(
                f"At {size} the sizes are not equal: {run_name(least)} removes {least.achieved:.4f} of all parameters, "
                f"{run_name(most)} {most.achieved:.4f}. Units are removed whole."
            )
    return notes


def _more(runs: Sequence[Run]) -> dict[str, dict[Run, str]]:
    """Notes on measurements beside perplexity, which keep no runs apart."""
    more: dict[str, dict[Run, str]] = {"distance from the dense model": {}, "long windows": {}, "continuations": {}}
    for run in runs:
        metrics, written = run.metrics, run.metrics.continuations
        long = {str(one.seq_len) for one in metrics.evaluation.values() if one.long_windows_of is not None}
        more["distance from the dense model"][run] = "measured" if metrics.distance else "not measured"
        more["long windows"][run] = ", ".join(sorted(long)) or "none"
        sizes = written and (written.prompts, written.prompt_tokens, written.new_tokens)
        more["continuations"][run] = "none" if sizes is None else "{} prompts of {} tokens, {} new".format(*sizes)
    return more


def _short(value: Any) -> Any:
    if value is None:
        return "none"
    return value[:12] if isinstance(value, str) and len(value) == 64 else value
