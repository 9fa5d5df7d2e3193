"""Perplexity against what it buys or costs: size, measured speed, seconds. Marks that no other beats are ringed."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lightning_prune.comparison.pareto import front
from lightning_prune.comparison.repeats import to_prune
from lightning_prune.comparison.run import Run
from lightning_prune.comparison.speed import Speeds
from lightning_prune.comparison.style import SOFT, Styles, legend, new_figure, shown, tip
from lightning_prune.comparison.tables import display_names, number
from lightning_prune.runs.verdict import UNUSABLE, unusable_limit

LOG_RANGE = 10  # numbers further apart than this factor get a logarithmic axis
BEYOND = 2  # times the limit of the unusable: where the perplexity axis ends
NEAR = 1.5  # a limit further above all values than this factor is not drawn
HEIGHT = 3.9  # inches
Point = tuple[Run, float]


def size_figure(runs: Sequence[Run], name: str, short: str, styles: Styles) -> Figure:
    """Perplexity on evaluation set ``name`` over the achieved ratio, one line per system, dense as reference.

    For the front, ratios within one percent of the model are the same: methods round to whole units.
    """
    figure, (axes,) = new_figure(HEIGHT)
    points = [(run, run.achieved) for run in runs if name in run.sets]
    _marks(axes, points, name, styles, lambda x: f"{x:.2%} removed", lines=True)
    _ring(axes, points, [-round(run.achieved, 2) for run, _ in points], name)
    _perplexity_axis(axes, [run for run, _ in points], name, short)
    asked = sorted({run.requested for run, _ in points})
    axes.xaxis.set_major_locator(FixedLocator(asked) if len(asked) < 7 else MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %"))
    axes.set_xlabel("achieved pruning ratio (share of all parameters)")
    legend(figure, axes)
    return figure


def speed_figure(runs: Sequence[Run], name: str, short: str, styles: Styles, measured: Speeds) -> Figure:
    """Perplexity over decoded tokens per second, of the runs whose speed was measured alike."""
    figure, (axes,) = new_figure(HEIGHT)
    points = [(run, measured.pruned[id(run)]) for run in runs if name in run.sets and id(run) in measured.pruned]
    _marks(axes, points, name, styles, lambda x: f"{x:,.1f} tokens/s")
    _ring(axes, points, [-x for _, x in points], name)
    if measured.dense is not None:
        label = f"dense speed ({measured.dense:,.0f})"
        axes.axvline(measured.dense, color=SOFT, linewidth=1, linestyle=(0, (1, 2)), label=label)
    _perplexity_axis(axes, [run for run, _ in points], name, short)
    axes.set_xlabel("decoded tokens per second")
    legend(figure, axes)
    return figure


def cost_figure(runs: Sequence[Run], name: str, short: str, styles: Styles) -> Figure:
    """Perplexity over the seconds of calibrating and pruning, for runs of one ratio."""
    figure, (axes,) = new_figure(HEIGHT)
    points = [(run, x) for run in runs if name in run.sets and (x := to_prune(run)) is not None]
    _marks(axes, points, name, styles, lambda x: f"{x:,.1f} s to calibrate and prune")
    _ring(axes, points, [x for _, x in points], name)
    _perplexity_axis(axes, [run for run, _ in points], name, short)
    values = [x for _, x in points if x > 0]
    if values and max(values) / min(values) > LOG_RANGE:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("seconds to calibrate and prune")
    legend(figure, axes)
    return figure


def _marks(
    axes: Axes, points: Sequence[Point], name: str, styles: Styles, tell: Callable[[float], str], lines: bool = False
) -> None:
    """One mark a run, in its system's style; ``tell`` puts its number on the horizontal axis in words."""
    names, top = display_names([run for run, _ in points]), _top([run for run, _ in points], name)
    for label in [label for label in styles if label in names.values()]:
        style = styles[label] | ({} if lines else {"linestyle": "none"})
        mine = sorted(((x, run) for run, x in points if names[id(run)] == label), key=lambda pair: pair[0])
        heights = [_height(run.perplexity(name), top) for _, run in mine]
        axes.plot([], [], label=shown(label), markersize=6, linewidth=1.4, **style)
        if lines:
            axes.plot([x for x, _ in mine], heights, linewidth=1.4, **style | {"marker": "none"})
        for (x, run), y in zip(mine, heights, strict=True):
            mark = axes.plot([x], [y], markersize=6, clip_on=False, zorder=3, **style)[0]
            found = f"perplexity {number(run.perplexity(name))}"
            deviation = run.deviation(name)
            if deviation is not None:
                found += f" ± {number(deviation)}"
                axes.errorbar([x], [y], yerr=[deviation], fmt="none", ecolor=style["color"], elinewidth=1, capsize=4)
            tip(mark, f"{label}, ratio {run.requested:g}: {found}, {tell(x)}, {run.verdict(name)}")


def _ring(axes: Axes, points: Sequence[Point], less_is_better: Sequence[float], name: str) -> None:
    """A ring round every mark that no other beats in both numbers; unusable models beat nobody."""
    usable = [None if run.verdict(name) == UNUSABLE else run.perplexity(name) for run, _ in points]
    best = front(list(zip(less_is_better, usable, strict=True)))
    if best:
        x, y = [points[index][1] for index in best], [usable[index] or 0.0 for index in best]
        axes.plot(x, y, "o", markersize=12, fillstyle="none", color=SOFT, clip_on=False, label="Pareto front")


def _perplexity_axis(axes: Axes, runs: Sequence[Run], name: str, short: str) -> None:
    dense, limit, top = _dense(runs, name), _limit(runs, name), _top(runs, name)
    values = [_height(value, top) for value in (dense, *(run.perplexity(name) for run in runs)) if value is not None]
    if dense is not None:
        axes.axhline(dense, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), label=f"dense ({dense:.4g})")
    if limit is not None and values and max(values) > limit / NEAR:
        axes.axhline(limit, color=SOFT, linewidth=1, linestyle=":", label=f"unusable from {limit:.3g}")
    if values and max(values) / min(values) > LOG_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if top is not None:
        axes.set_ylim(top=top)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(shown(f"perplexity on {short}"))


def _dense(runs: Sequence[Run], name: str) -> float | None:
    return next((found for run in runs if (found := run.perplexity(name, "dense"))), None)


def _limit(runs: Sequence[Run], name: str) -> float | None:
    return unusable_limit(_dense(runs, name), next((run.unigram_perplexity(name) for run in runs), None))


def _top(runs: Sequence[Run], name: str) -> float | None:
    """Where the perplexity axis ends, because something lies beyond: marks there stand on its edge. None: no end."""
    limit, values = _limit(runs, name), [run.perplexity(name) for run in runs]
    known = [value for value in values if value is not None]
    if limit is not None and known and max(known) > BEYOND * limit:
        return BEYOND * limit
    return 1.2 * max(known) if known and len(known) < len(values) else None


def _height(perplexity: float | None, top: float | None) -> float:
    if perplexity is None:
        return float("nan") if top is None else top
    return perplexity if top is None else min(perplexity, top)
