"""The comparison in TensorBoard: a run per system, with its importance and what it keeps as curves over layers, and its
perplexity over the ratio. ``tensorboard/`` itself has a layout of custom scalars with a category per ratio.
"""

import re
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lightning_prune.comparison.audit import Audit
from lightning_prune.comparison.repeats import percent, repeats
from lightning_prune.comparison.selection import kept_fraction
from lightning_prune.models.vocabulary import ROLES_OF
from lightning_prune.support.escape import plain

FOLDER = "tensorboard"


def log_comparison(audit: Audit, folder: Path) -> None:
    """Write the comparison's TensorBoard events to ``folder/tensorboard``."""
    layout: dict[str, dict[str, list[object]]] = {}
    taken: set[str] = set()
    for number, group in enumerate(audit.groups, start=1):
        lines, table = repeats(group.all), f" table {number}" if number > 1 else ""
        for name in dict.fromkeys(line.name for line in lines):
            # Whatever a label holds, its folder is below this one and its own.
            safe = re.sub(r"[^A-Za-z0-9._ %,+-]+", "_", name + table)[:150].lstrip(". ") or "run"
            place = folder / FOLDER / (f"{safe} ({len(taken)})" if safe in taken else safe)
            taken.add(safe)
            with SummaryWriter(str(place)) as writer:
                for line in lines:
                    if line.name != name:
                        continue
                    key = f"comparison{table} {percent(line.size)}"
                    units = line.first.units
                    curves = {"share of importance": units.per_layer(units.importance) / (units.importance.sum() or 1)}
                    curves |= {f"kept fraction {block}": kept_fraction(line.first, block) for block in ROLES_OF}
                    for title, values in curves.items():
                        for layer, value in enumerate(values):
                            writer.add_scalar(f"{key}/{title}", float(value), layer)
                    # TensorBoard smooths every curve but those with a margin, and smoothing over layers would show
                    # another curve; so these have one, of width 0.
                    for data in line.sets:
                        if (mean := line.perplexity(data).mean) is not None:
                            writer.add_scalar(
                                plain(f"comparison{table}/perplexity/{data}"), mean, round(line.first.requested * 100)
                            )
                    layout[key] = {f"{title} by layer": ["Margin", [f"{key}/{title}"] * 3] for title in curves}
    with SummaryWriter(str(folder / FOLDER)) as writer:
        writer.add_custom_scalars(layout)
