"""What half precision changes: runs and the same run in 32-true, unit by unit."""

from collections.abc import Sequence
from typing import Any

from lightning_prune.comparison.records import Run
from lightning_prune.comparison.repeats import decision
from lightning_prune.comparison.selection import changed_units

FULL = "32-true"


def precision_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per evaluation set and run in another precision, with the run in 32-true whose method, options, ratio, base
    model and calibration tokens are the same, by ratio; of U ``units`` some are ``decided_differently``."""

    def key(run: Run) -> str:
        tokens = None if run.calibration is None else run.calibration.fingerprint
        return repr((run.metrics.method.name, decision(run), run.requested, run.base, tokens))

    full = {key(run): run for run in reversed(runs) if run.environment.precision == FULL}  # the first one is kept
    rows = []
    for run in sorted(runs, key=lambda run: run.requested):
        other = full.get(key(run))
        changed = None if other is None or run.environment.precision == FULL else changed_units(run, other)
        if other is None or changed is None:
            continue
        for name in run.sets:
            rows.append(
                {
                    "system": run.label,
                    "requested_ratio": run.requested,
                    "precision": run.environment.precision,
                    "units": changed[1],
                    "decided_differently": changed[0],
                    "jaccard_kept": changed[2],
                    "evaluation_set": name,
                    "perplexity": run.shown_perplexity(name),
                    "perplexity_32_true": other.shown_perplexity(name) if name in other.sets else "",
                    "folder": run.folder,
                    "folder_32_true": other.folder,
                }
            )
    return rows
