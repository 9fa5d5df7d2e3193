"""What the audit found, said once: facts that set the same runs apart share a line, whatever their ratios."""

from collections.abc import Sequence

from lightning_prune.comparison.audit import RATIO_FACT, Audit, Difference
from lightning_prune.comparison.run import Run
from lightning_prune.comparison.tables import display_names


def summary(audit: Audit) -> list[str]:
    """One line per system or group of runs that stands apart, with every fact in which it does."""
    runs = [run for group in audit.groups for run in group.all]
    lines: list[str] = []
    facts: dict[tuple[frozenset[int], ...], list[Difference]] = {}
    for one in audit.differences:
        if one.what == RATIO_FACT:
            lines += _ratios(one, runs)
        else:
            parts = tuple(frozenset(map(id, members)) for members in one.values.values())
            facts.setdefault(tuple(sorted(parts, key=sorted)), []).append(one)
    for together in facts.values():
        lines += _apart(together, runs)
    return lines


def _apart(together: Sequence[Difference], runs: Sequence[Run]) -> list[str]:
    """Facts with the same runs behind their values: the largest part is what the others are held against."""
    parts = sorted(together[0].values.values(), key=len, reverse=True)
    lines = []
    for members in parts[1:]:
        told = []
        for one in together:
            value, usual = (_value(one, part[0]) for part in (members, parts[0]))
            told.append(f"{one.what} {value} instead of {usual}" + (f" ({one.remark})" if one.remark else ""))
        lines.append(f"{_names(members, runs)}: {'; '.join(told)} in {_names(parts[0], runs)}")
    return lines


def _ratios(difference: Difference, runs: Sequence[Run]) -> list[str]:
    """A line per system; its ratios one after the other."""
    systems: dict[str, list[str]] = {}
    for value, members in difference.values.items():
        for label in dict.fromkeys(run.label for run in members):
            systems.setdefault(label, []).append(value)
    told = "; ".join(f"{label} {', '.join(values)}" for label, values in systems.items())
    return [f"{difference.what}: {told} ({difference.remark})"]


def _value(difference: Difference, run: Run) -> str:
    return next(value for value, members in difference.values.items() if any(run is other for other in members))


def _names(members: Sequence[Run], runs: Sequence[Run]) -> str:
    """Labels; with their ratios where only some of a label's runs are meant."""
    called, names = display_names(runs), []
    for label in dict.fromkeys(run.label for run in members):
        mine = [run for run in members if run.label == label]
        every = sum(run.label == label for run in runs)
        names += [label] if len(mine) == every else [f"{called[id(run)]} {run.requested:g}" for run in mine]
    return ", ".join(names)
