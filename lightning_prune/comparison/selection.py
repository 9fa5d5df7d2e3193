"""The units that runs keep, and how far runs agree on them. Only this module reads score tables."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from numpy.typing import NDArray

from lightning_prune.comparison.records import Run
from lightning_prune.comparison.repeats import decision
from lightning_prune.models.vocabulary import Block

Floats = NDArray[np.float64]
FULL = "32-true"


def kept_fraction(run: Run, block: Block) -> Floats:
    """Share of a block's units that are kept ``[L]``; a layer unit counts as both blocks. NaN where there are none."""
    return run.units.kept_fraction(Block.LAYER if run.units.whole_layers else block)


def agreement(runs: Sequence[Run]) -> tuple[Floats, Floats]:
    """Spearman's rank correlation of scores and the Jaccard index of kept units between every two of R runs ``[R, R]``;
    NaN where two do not rank the same units."""
    spearman, overlap = (np.full((len(runs), len(runs)), np.nan) for _ in range(2))
    for row, column in itertools.combinations_with_replacement(range(len(runs)), 2):
        left, right = runs[row].units, runs[column].units
        if all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ("layer", "code", "unit", "cost")):
            scores = pd.DataFrame({"left": left.score, "right": right.score})
            spearman[row, column] = spearman[column, row] = scores.corr("spearman").loc["left", "right"]
            overlap[row, column] = overlap[column, row] = jaccard(left.kept, right.kept)
    return spearman, overlap


def jaccard(left: NDArray[np.bool_], right: NDArray[np.bool_]) -> float:
    """|A ∩ B| / |A ∪ B| of two sets ``[U]``; NaN when both are empty."""
    union = int((left | right).sum())
    return int((left & right).sum()) / union if union else float("nan")


def precision_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per evaluation set and run in another precision, with the run in 32-true whose method, options, ratio, base
    model and calibration tokens are the same, by ratio; of U ``units`` some are ``decided_differently``."""

    def key(run: Run) -> str:
        tokens, method = None if run.calibration is None else run.calibration.fingerprint, run.metrics.method
        base = method.base_model_sha256 or method.base_model
        return repr((method.name, decision(run), run.size, base, tokens))

    full = {key(run): run for run in reversed(runs) if run.environment.precision == FULL}  # the first one is kept
    rows, targets = [], any(run.target for run in runs)
    for run in sorted(runs, key=lambda run: run.requested):
        other = full.get(key(run))
        if other is None or run.environment.precision == FULL or len(run.units.kept) != len(other.units.kept):
            continue
        left, right = run.units.kept, other.units.kept
        for name in run.sets:
            rows.append(
                {
                    "system": run.label,
                    "requested_ratio": run.metrics.pruning_ratio.requested,
                    **({"target": run.target} if targets else {}),
                    "precision": run.environment.precision,
                    "units": len(left),
                    "decided_differently": int(np.sum(left != right)),
                    "jaccard_kept": jaccard(left, right),
                    "evaluation_set": name,
                    "perplexity": run.shown_perplexity(name),
                    "perplexity_32_true": other.shown_perplexity(name) if name in other.sets else "",
                    "folder": run.folder,
                    "folder_32_true": other.folder,
                }
            )
    return rows
