"""The numbers behind the answer: which runs of an audit are ranked, on which evaluation set, and what is left out."""

from collections.abc import Sequence

from lightning_prune.comparison.answer import Entry, answer, leaders, listed, percent
from lightning_prune.comparison.audit import Audit, Group
from lightning_prune.comparison.names import short_names
from lightning_prune.comparison.repeats import Repeats, repeats
from lightning_prune.comparison.seeds import TOKENS
from lightning_prune.comparison.tables import display_names, evaluation_sets


def conclusion(audit: Audit) -> list[str]:
    """Paragraphs: the answer from the first table, and, where there is more, what it does not cover.

    Ranked are the runs of the first table that reached their ratio, on its first evaluation set.
    """
    group = audit.groups[0]
    sets = evaluation_sets(group.runs)
    if not sets:
        return [*answer([], None, ""), *_beside(audit)]
    short = short_names(evaluation_sets(group.all))
    entries = _entries(group, sets[0])
    dense = next(run.perplexity(sets[0], "dense") for run in group.runs if sets[0] in run.sets)
    return [*answer(entries, dense, short[sets[0]]), *_other_sets(group, sets, short), *_beside(audit)]


def _entries(group: Group, name: str) -> list[Entry]:
    lines = repeats(group.runs)
    names = display_names([line.first for line in lines])
    return [_entry(line, names[id(line.first)], name) for line in lines if name in line.sets]


def _entry(line: Repeats, system: str, name: str) -> Entry:
    first = line.first
    drawn = first.calibration is not None and first.calibration.get("seed") is not None
    return Entry(system, first.requested, line.perplexity(name), line.verdict(name), line.seconds, drawn)


def _other_sets(group: Group, sets: Sequence[str], short: dict[str, str]) -> list[str]:
    """Whether the other evaluation sets name the same systems."""
    if len(sets) == 1:
        return []
    based, told = _best(group, sets[0]), []
    for name in sets[1:]:
        here = _best(group, name)
        differ: dict[str, list[str]] = {}  # ratios by what leads there
        for ratio in here:
            if set(here[ratio]) != set(based.get(ratio, [])):
                differ.setdefault(listed(here[ratio] or ["nothing usable"]), []).append(percent(ratio))
        other = [f"{systems} at {listed(where)}" for systems, where in differ.items()]
        told.append(f"on {short[name]} {'it is ' + ', '.join(other) if other else 'the same systems lead'}")
    return [f"This is about {short[sets[0]]}, the first of {len(sets)} evaluation sets; {'; '.join(told)}."]


def _best(group: Group, name: str) -> dict[float, list[str]]:
    entries = _entries(group, name)
    return {
        ratio: [entry.system for entry in leaders([one for one in entries if one.ratio == ratio])]
        for ratio in sorted({entry.ratio for entry in entries})
    }


def _beside(audit: Audit) -> list[str]:
    """What is not ranked, and where it stands."""
    told = []
    missed = list(dict.fromkeys(f"{run.label} at {percent(run.requested)}" for run in audit.groups[0].other_ratio))
    if missed:
        told.append(f"{', '.join(missed)} reached another ratio than the one asked for")
    for number, group in enumerate(audit.groups[1:], start=2):
        labels = ", ".join(dict.fromkeys(run.label for run in group.all))
        facts = [text.partition(":")[0] for text in group.differs if not text.startswith(TOKENS)]
        # A dataset of another kind differs in everything; its table says in what.
        told.append(f"{labels} (table {number}, another {facts[0] if len(facts) == 1 else 'setting'})")
    return [f"Not ranked here: {'; '.join(told)}."] if told else []
