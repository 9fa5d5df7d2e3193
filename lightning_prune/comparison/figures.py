"""Which plots a report shows, with their captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from matplotlib.figure import Figure

from lightning_prune.comparison.agreement import chance_jaccard, layer_agreement, unit_agreement
from lightning_prune.comparison.audit import Group, protocol
from lightning_prune.comparison.distributions import score_figure
from lightning_prune.comparison.maps import kept_figure, matrix_figure
from lightning_prune.comparison.names import short_names
from lightning_prune.comparison.plots import importance_figure, seconds_figure
from lightning_prune.comparison.quality import cost_figure, size_figure, speed_figure
from lightning_prune.comparison.repeats import repeats, seeds, to_prune
from lightning_prune.comparison.run import Run
from lightning_prune.comparison.speed import speeds
from lightning_prune.comparison.style import Styles, line_styles
from lightning_prune.comparison.tables import display_names, evaluation_sets
from lightning_prune.support.escape import plain, public_name

APART = " †"
EDGE = "What lies beyond the scale stands on its upper edge."


@dataclass(frozen=True)
class Plot:
    """A figure under a heading; ``tag`` is its name in TensorBoard. What is ``first`` stands right below the tables."""

    heading: str
    tag: str
    caption: str
    figure: Figure
    first: bool = False


@dataclass(frozen=True)
class Shared:
    """Runs of groups that share base model and evaluation; those of the smaller groups carry a dagger.

    ``number`` counts such sets of runs from 1; it is 0, and ``where`` in headings empty, where there is only one.
    Where ``seeds`` were repeated, the first one's run stands for all, with the mean perplexities.
    """

    runs: list[Run]
    number: int
    where: str
    seeds: list[int] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Asked for, ascending."""
        return sorted({run.requested for run in self.runs})

    def tag(self, ratio: float | None = None) -> str:
        """The group of TensorBoard's tags for one ratio or for all; it sorts before the tags of single runs."""
        setting = f" setting {self.number}" if self.number else ""
        return plain(f"comparison{setting}" + ("" if ratio is None else f" {ratio * 100:g} %"))

    @property
    def dagger(self) -> str:
        """What the mark behind a name means, where there is one, and what stands for several seeds."""
        apart = any(run.label.endswith(APART) for run in self.runs)
        mark = f" {APART.strip()} calibrated differently, see the tables." if apart else ""
        over = f"Perplexities are means over seeds {', '.join(map(str, self.seeds))} with their deviation"
        return f"{mark} {over}, everything else is of seed {self.seeds[0]}." if self.seeds else mark


def shared(groups: Sequence[Group]) -> list[Shared]:
    """Runs that may share plots, by protocol."""
    found: dict[str, list[list[Run]]] = {}
    for group in groups:
        found.setdefault(repr(protocol(group.all[0])), []).append(group.all)
    result = []
    for number, members in enumerate(found.values(), start=1):
        lines = [[line.mean_run for line in repeats(group)] for group in members]
        runs = [
            replace(run, label=run.label + APART) if index else run
            for index, group in enumerate(lines)
            for run in group
        ]
        drawn = seeds([run for group in members for run in group]) if len(runs) < sum(map(len, members)) else []
        order = list(dict.fromkeys(run.label for run in runs))
        runs.sort(key=lambda run: (order.index(run.label), run.requested))
        several = len(found) > 1
        where = f" ({public_name(runs[0].base_model)}, setting {number})" if several else ""
        result.append(Shared(runs, number if several else 0, where, drawn))
    return result


def plots(groups: Sequence[Shared]) -> Iterator[Plot]:
    """Everything the runs allow."""
    for one in groups:
        names = display_names(one.runs)
        styles = line_styles(list(dict.fromkeys(names[id(run)] for run in one.runs)))
        yield from _quality(one, styles)
        for ratio in one.ratios:
            yield from _at_ratio(one, ratio, styles)
        caption = f"Wall-clock time without loading, tokenising and the evaluation of the dense model.{one.dagger}"
        yield Plot(f"Seconds by phase{one.where}", f"{one.tag()}/seconds", caption, seconds_figure(one.runs))


def _quality(one: Shared, styles: Styles) -> Iterator[Plot]:
    heading = f"Quality against size and speed{one.where}"
    short = short_names(evaluation_sets(one.runs))
    for name in short:
        caption = (
            f"Lower and further right is better. Pareto front: no run removes as much with less perplexity. "
            f"{EDGE}{one.dagger}"
        )
        figure = size_figure(one.runs, name, short[name], styles)
        yield Plot(heading, f"{one.tag()}/perplexity and size/{name}", caption, figure, first=True)
    measured = speeds(one.runs)
    if measured is None:
        return
    for name in short:
        caption = f"{measured.how}. Lower and further right is better. {EDGE}{one.dagger}"
        figure = speed_figure(one.runs, name, short[name], styles, measured)
        yield Plot(heading, f"{one.tag()}/perplexity and speed/{name}", caption, figure, first=True)


def _at_ratio(one: Shared, ratio: float, styles: Styles) -> Iterator[Plot]:
    runs = [run for run in one.runs if run.requested == ratio]
    heading, key = f"At a ratio of {ratio * 100:g} %{one.where}", f"{one.tag(ratio)}/"
    if any(to_prune(run) is not None for run in runs):
        for name, short in short_names(evaluation_sets(one.runs)).items():
            if not any(name in run.sets for run in runs):
                continue
            caption = f"Lower and further left is better. A reused calibration counts in full. {EDGE}{one.dagger}"
            yield Plot(heading, f"{key}perplexity and seconds/{name}", caption, cost_figure(runs, name, short, styles))
    caption = f"Share of attention groups and MLP channels that stay in every layer.{one.dagger}"
    yield Plot(heading, f"{key}kept fraction", caption, kept_figure(runs))
    caption = f"How each method spreads its importance over the layers; each line sums to 100 %.{one.dagger}"
    yield Plot(heading, f"{key}importance", caption, importance_figure(runs, styles))
    caption = (
        f"Units by score, each method over its own median; a method that weighs cost or layers cuts across.{one.dagger}"
    )
    yield Plot(heading, f"{key}scores", caption, score_figure(runs))
    units = unit_agreement(runs)
    if len(units.labels) > 1:
        caption = f"Between methods that rank attention groups and MLP channels.{one.dagger}"
        figure = matrix_figure(units.labels, units.spearman, "rank correlation of scores (Spearman)", -1)
        yield Plot(heading, f"{key}agreement of units/scores", caption, figure)
        caption = f"Two random choices of this size would overlap by {chance_jaccard(runs):.2f}.{one.dagger}"
        figure = matrix_figure(units.labels, units.jaccard, "overlap of kept units (Jaccard)", 0)
        yield Plot(heading, f"{key}agreement of units/kept", caption, figure)
    if len(runs) > 1:
        layers = layer_agreement(runs)
        caption = f"Kept parameters by layer, where methods that remove whole layers can be compared, too.{one.dagger}"
        figure = matrix_figure(layers.labels, layers.jaccard, "overlap of kept parameters by layer (Jaccard)", 0)
        yield Plot(heading, f"{key}agreement of layers/kept", caption, figure)
        caption = f"– where a method keeps the same share everywhere.{one.dagger}"
        title = "rank correlation of kept parameters by layer (Spearman)"
        figure = matrix_figure(layers.labels, layers.spearman, title, -1)
        yield Plot(heading, f"{key}agreement of layers/ranks", caption, figure)
