"""Which plots a report shows, with their captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from lightning_prune.comparison.agreement import chance_jaccard, layer_agreement, unit_agreement
from lightning_prune.comparison.audit import Audit, Group, protocol
from lightning_prune.comparison.plots import (
    importance_figure,
    kept_figure,
    matrix_figure,
    perplexity_figure,
    seconds_figure,
)
from lightning_prune.comparison.run import Run
from lightning_prune.comparison.style import Styles, line_styles
from lightning_prune.comparison.tables import display_names, evaluation_sets

APART = " †"


@dataclass(frozen=True)
class Plot:
    """A figure under a heading; ``tag`` is its name in TensorBoard."""

    heading: str
    tag: str
    caption: str
    figure: Figure


def plots(audit: Audit) -> Iterator[Plot]:
    """Everything the runs allow. Groups that share base model and evaluation share plots; the smaller group's runs
    carry a dagger there."""
    for number, runs in enumerate(_shared(audit.groups), start=1):
        where = f" ({runs[0].base_model}, setting {number})" if len(_shared(audit.groups)) > 1 else ""
        key = f"{number}/" if where else ""
        dagger = " † calibrated differently, see the tables." if any(APART in run.label for run in runs) else ""
        names = display_names(runs)
        styles = line_styles(list(dict.fromkeys(names[id(run)] for run in runs)))
        for name in evaluation_sets(runs):
            caption = f"Lower is better. Every point is one run.{dagger}"
            yield Plot(f"Perplexity{where}", f"{key}perplexity/{name}", caption, perplexity_figure(runs, name, styles))
        for ratio in sorted({run.requested for run in runs}):
            same = [run for run in runs if run.requested == ratio]
            yield from _at_ratio(same, f"Asked for {ratio:g}{where}", f"{key}{ratio:g}/", dagger, styles)
        caption = f"Wall-clock time without loading, tokenising and the evaluation of the dense model.{dagger}"
        yield Plot(f"Seconds per phase{where}", f"{key}seconds", caption, seconds_figure(runs))


def _at_ratio(runs: list[Run], heading: str, key: str, dagger: str, styles: Styles) -> Iterator[Plot]:
    caption = f"How each method spreads its importance over the layers; each line sums to 100 %.{dagger}"
    yield Plot(heading, f"{key}importance", caption, importance_figure(runs, styles))
    caption = f"Share of GQA groups (attention) and channels (mlp) that stay in every layer.{dagger}"
    yield Plot(heading, f"{key}kept fraction", caption, kept_figure(runs))
    units = unit_agreement(runs)
    if len(units.labels) > 1:
        caption = (
            f"Between methods that rank GQA groups and MLP channels. Two random choices of this size would overlap by "
            f"{chance_jaccard(runs):.2f}.{dagger}"
        )
        yield Plot(heading, f"{key}agreement of units", caption, matrix_figure(units, "scores"))
    if len(runs) > 1:
        caption = (
            f"Kept parameters per layer, the level at which methods that remove whole layers can be compared. "
            f"– where a method keeps the same share everywhere.{dagger}"
        )
        figure = matrix_figure(layer_agreement(runs), "kept parameters per layer")
        yield Plot(heading, f"{key}agreement of layers", caption, figure)


def _shared(groups: Sequence[Group]) -> list[list[Run]]:
    """Runs by protocol; those of a protocol's second and later groups get the dagger."""
    found: dict[str, list[list[Run]]] = {}
    for group in groups:
        found.setdefault(repr(protocol(group.all[0])), []).append(group.all)
    result = []
    for members in found.values():
        runs = [
            replace(run, label=run.label + APART) if index else run
            for index, group in enumerate(members)
            for run in group
        ]
        order = list(dict.fromkeys(run.label for run in runs))
        result.append(sorted(runs, key=lambda run: (order.index(run.label), run.requested)))
    return result
