"""Selection by walking over the units one after the other, as slow and as plain as it can be said.

Nothing of ``lightning_prune`` is used here.
"""

from collections import defaultdict
from dataclasses import dataclass

Block = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """One prunable unit with its place in the table; ``block`` 0 is attention, 1 the MLP."""

    place: int
    layer: int
    block: int
    unit: int
    cost: int
    base: float
    score: float


class UnreachableError(Exception):
    """The budget cannot be met; ``parameters`` can."""

    def __init__(self, parameters: int) -> None:
        super().__init__(parameters)
        self.parameters = parameters


def ranked(rows: list[Row]) -> list[Row]:
    """First to go first."""
    return sorted(rows, key=lambda row: (row.score, row.base, row.layer, row.block, row.unit))


def unprotected(rows: list[Row], keep: int) -> set[Row]:
    """All but the ``keep`` best of every block."""
    inside: dict[Block, list[Row]] = defaultdict(list)
    for row in ranked(rows):
        inside[row.layer, row.block].append(row)
    return {row for members in inside.values() for row in members[: max(0, len(members) - keep)]}


def prefix(rows: list[Row], free: set[Row], budget: int, overhead: dict[Block, int], round_to: int) -> set[Row]:
    """Walk up the ranking; channels wait until a multiple of ``round_to`` stays, the first bundle too dear ends it."""
    left: dict[Block, int] = defaultdict(int)
    unit_cost = {}
    for row in rows:
        left[row.layer, row.block] += 1
        unit_cost[row.layer, row.block] = row.cost
    if len(free) == len(rows):
        everything = sum(row.cost for row in rows) + sum(overhead.get(block, 0) for block in left)
        last = {block: min(count, round_to if block[1] == 1 else 1) for block, count in left.items()}
        largest = everything - max(last[block] * unit_cost[block] + overhead.get(block, 0) for block in left)
        if budget > largest:
            raise UnreachableError(largest)
    waiting: dict[Block, list[Row]] = defaultdict(list)
    removed: set[Row] = set()
    spent = 0
    for row in ranked(rows):
        if row not in free:
            continue
        block = row.layer, row.block
        waiting[block].append(row)
        stays = left[block] - len(waiting[block])
        if row.block == 1 and stays % round_to != 0:
            continue
        price = sum(member.cost for member in waiting[block])
        if stays == 0:
            price += overhead.get(block, 0)
        if spent + price > budget:
            return removed
        spent += price
        removed.update(waiting[block])
        left[block] = stays
        waiting[block] = []
    if spent < budget:
        raise UnreachableError(spent)
    return removed


def lowest_of_each(rows: list[Row], free: set[Row], counts: Block) -> set[Row]:
    """The ``counts`` (groups, channels) lowest candidates of every layer."""
    seen: dict[Block, int] = defaultdict(int)
    removed = set()
    for row in ranked(rows):
        if row in free and seen[row.layer, row.block] < counts[row.block]:
            seen[row.layer, row.block] += 1
            removed.add(row)
    return removed
