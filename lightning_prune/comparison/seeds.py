"""Several calibration seeds that are meant: which may stand in one table, because every system had all of them."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning_prune.comparison.run import Run

SEED, TOKENS = "calibration seed", "calibration tokens (fingerprint)"
Draw = list[Run]  # the runs of one seed, all on the same tokens


def joined(runs: Sequence[Run], facts: Callable[[Run], dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The two facts ``SEED`` and ``TOKENS`` of every run whose seed was joined with others, by ``id``.

    Seeds are joined where everything else agrees, and where at every ratio that both have the same systems ran: so
    means are over the same seeds for all, and within a seed all had the same tokens. A seed that some system lacks
    stays apart.

    Args:
        runs: any runs; those without calibration samples that were drawn are left alone.
        facts: what must agree before two runs may be compared, ``SEED`` and ``TOKENS`` among it.
    """
    families: dict[str, dict[tuple[Any, Any], Draw]] = {}
    for run in runs:
        if run.calibration is None or run.calibration.get("seed") is None:
            continue
        mine = facts(run)
        drawn = (mine.pop(SEED), mine.pop(TOKENS))
        families.setdefault(repr(mine), {}).setdefault(drawn, []).append(run)
    found: dict[int, dict[str, Any]] = {}
    for draws in families.values():
        clusters: list[list[tuple[Any, Any]]] = []
        for drawn in sorted(draws, key=lambda drawn: (-len(draws[drawn]), drawn[0])):
            fits = (one for one in clusters if all(_may_join(drawn, other, draws) for other in one))
            home = next(fits, None)
            if home is None:
                clusters.append([drawn])
            else:
                home.append(drawn)
        for cluster in clusters:
            cluster.sort(key=lambda drawn: int(drawn[0]))
            told = {SEED: ", ".join(str(seed) for seed, _ in cluster), TOKENS: ", ".join(t for _, t in cluster)}
            if len(cluster) > 1:
                found |= {id(run): told for drawn in cluster for run in draws[drawn]}
    return found


def _may_join(one: tuple[Any, Any], other: tuple[Any, Any], draws: dict[tuple[Any, Any], Draw]) -> bool:
    if one[0] == other[0] or one[1] == other[1]:
        return False
    left, right = _systems(draws[one]), _systems(draws[other])
    common = left.keys() & right.keys()
    return bool(common) and all(left[ratio] == right[ratio] for ratio in common)


def _systems(runs: Draw) -> dict[float, set[str]]:
    found: dict[float, set[str]] = {}
    for run in runs:
        found.setdefault(run.requested, set()).add(run.label)
    return found
