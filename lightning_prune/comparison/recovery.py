"""Runs that trained what another run had pruned: quality before and after, and what that cost."""

from collections.abc import Sequence

from lightning_prune.comparison.run import Run
from lightning_prune.runs.recovered import regained, share

COLUMNS = ("system", "from", "ratio", "set", "dense", "pruned", "recovered", "regained", "tokens seen", "train s")
TEXT = (
    "These systems trained the pruned model of the run they came from; the others did not train. Regained is the share "
    "of the lost log-perplexity: (ln pruned − ln recovered) / (ln pruned − ln dense)."
)


def before(run: Run, name: str) -> float | None:
    """Perplexity of the pruned model on one set before it was trained; None where the run did not train."""
    value = {} if run.recovery is None else run.recovery["perplexity"]
    return None if value.get(name) is None else float(value[name])


def table(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A row per run that trained and evaluation set, in the order given; ``COLUMNS`` says what stands where."""
    found = []
    for run in runs:
        if run.recovery is None:
            continue
        for name in run.sets:
            values = (run.perplexity(name, "dense"), before(run, name), run.perplexity(name))
            found.append(
                (
                    f"{run.label}/{run.folder.name}",
                    run.recovery["parent_label"],
                    f"{run.requested:g}",
                    name,
                    *("not finite" if value is None else f"{value:.3f}" for value in values),
                    share(regained(*values)),
                    f"{run.recovery['tokens_seen']:,}",
                    f"{run.recovery['seconds']:,.0f}",
                )
            )
    return found
