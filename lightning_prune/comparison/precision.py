"""What half precision changes: runs beside the same run in 32-true, unit by unit."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_prune.comparison.agreement import jaccard
from lightning_prune.comparison.repeats import NOT_OF_THE_DECISION
from lightning_prune.comparison.run import Run
from lightning_prune.comparison.tables import Row, display_names, evaluation_sets, number
from lightning_prune.support.escape import plain

FULL = "32-true"


@dataclass(frozen=True)
class Pair:
    """A run and the one that differs from it in nothing but its precision, ``full`` in 32-true.

    ``units``: U, of which ``changed`` were decided differently; ``jaccard`` of the kept ones, in [0, 1].
    """

    run: Run
    full: Run
    units: int
    changed: int
    jaccard: float


def pairs(runs: Sequence[Run]) -> list[Pair]:
    """Every run in another precision whose method, options, ratio, base model and calibration tokens are those of a
    run in 32-true, by ratio and then in the order given."""
    full = {_key(run): run for run in reversed(runs) if precision(run) == FULL}  # the first one stays
    found = []
    for run in sorted(runs, key=lambda run: run.requested):
        other = full.get(_key(run))
        if precision(run) != FULL and other is not None and len(other.units.kept) == len(run.units.kept):
            changed = int(np.sum(run.units.kept != other.units.kept))
            found.append(Pair(run, other, len(run.units.kept), changed, jaccard(run.units.kept, other.units.kept)))
    return found


def precision(run: Run) -> str:
    """The trainer's precision."""
    return str(run.environment.get("precision"))


def table(found: Sequence[Pair]) -> tuple[tuple[str, ...], list[Row]]:
    """Columns and rows; perplexities of the pruned models, the run's own first."""
    sets = evaluation_sets([pair.run for pair in found])
    names = display_names([run for pair in found for run in (pair.run, pair.full)])
    columns = ["system", "ratio", "precision", f"{FULL} run", "decided differently", "Jaccard of kept units"]
    columns += [column for name in sets for column in (f"perplexity {name}", f"in {FULL}")]
    rows = []
    for pair in found:
        cells = [names[id(pair.run)], f"{pair.run.requested:g}", precision(pair.run), names[id(pair.full)]]
        cells += [f"{pair.changed:,} of {pair.units:,}", f"{pair.jaccard:.4f}"]
        for name in sets:
            cells += [number(run.perplexity(name)) if name in run.sets else "–" for run in (pair.run, pair.full)]
        rows.append(tuple(cells))
    return tuple(columns), rows


def csv_text(found: Sequence[Pair]) -> str:
    """``precision.csv``: one line per pair and evaluation set, full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    facts = ("system", "requested_ratio", "precision", "units", "decided_differently", "jaccard_kept")
    writer.writerow((*facts, "evaluation_set", "perplexity", "perplexity_32_true", "folder", "folder_32_true"))
    for pair in found:
        line = (plain(pair.run.label), pair.run.requested, precision(pair.run), pair.units, pair.changed, pair.jaccard)
        for name in pair.run.sets or [""]:
            values = [run.perplexity(name) if name in run.sets else "" for run in (pair.run, pair.full)]
            shown = ["not finite" if value is None else value for value in values]
            writer.writerow((*line, plain(name), *shown, plain(pair.run.folder), plain(pair.full.folder)))
    return buffer.getvalue()


def _key(run: Run) -> str:
    options = {name: value for name, value in run.options.items() if name not in NOT_OF_THE_DECISION}
    model = run.base_model_sha256 or run.base_model
    calibration = None if run.calibration is None else run.calibration.get("fingerprint")
    return repr((run.method, sorted(options.items(), key=lambda pair: pair[0]), run.requested, model, calibration))
