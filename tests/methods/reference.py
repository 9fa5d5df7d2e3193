"""Slow references of group pruning in float64, as plain as they can be said: loops and hooks.

Nothing of ``lightning_prune`` is used here.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tests.methods.running import inputs_of, mean_token_loss, projections

Block = tuple[int, int]
WeightScores = list[dict[str, np.ndarray]]  # of every layer, by projection


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


# Scores of single weights


def sizes(model: Any, tokens: Tensor) -> WeightScores:
    """|w|."""
    return [
        {name: linear.weight.detach().abs().numpy() for name, linear in projections(model, layer).items()}
        for layer in range(len(model.model.layers))
    ]


def activations(model: Any, tokens: Tensor) -> WeightScores:
    """|w|·‖x‖, one token after the other."""
    found = sizes(model, tokens)
    for layer, scores in enumerate(found):
        for name, linear in projections(model, layer).items():
            total = np.zeros(linear.in_features)
            for token in inputs_of(model, linear, tokens).numpy():
                total += token**2
            scores[name] = scores[name] * np.sqrt(total)
    return found


def slopes(model: Any, tokens: Tensor) -> WeightScores:
    """|w·g| with autograd through the whole model."""
    model = copy.deepcopy(model)
    mean_token_loss(model, tokens).backward()
    return [
        {name: (w.weight * w.weight.grad).detach().abs().numpy() for name, w in projections(model, layer).items()}
        for layer in range(len(model.model.layers))
    ]


# Units


def group_rows(model: Any, scores: WeightScores) -> list[Row]:
    """Units of a model from per-weight scores: importance is the sum over a unit's weights."""
    config = model.config
    d, kv_heads = config.head_dim, config.num_key_value_heads
    r, hidden = config.num_attention_heads // kv_heads, config.hidden_size
    rows: list[Row] = []

    def add(layer: int, block: int, unit: int, importance: float, cost: int) -> None:
        rows.append(Row(len(rows), layer, block, unit, cost, importance / cost, importance / cost))

    for layer, score in enumerate(scores):
        attention, mlp = model.model.layers[layer].self_attn, model.model.layers[layer].mlp
        for head in range(kv_heads):
            queries, keys = range(head * r * d, (head + 1) * r * d), range(head * d, (head + 1) * d)
            total = sum(score["q_proj"][i].sum() + score["o_proj"][:, i].sum() for i in queries)
            total += sum(score["k_proj"][i].sum() + score["v_proj"][i].sum() for i in keys)
            cost = len(queries) * (2 * hidden + (attention.q_proj.bias is not None))
            add(layer, 0, head, total, cost + len(keys) * 2 * (hidden + (attention.k_proj.bias is not None)))
        for channel in range(config.intermediate_size):
            total = score["gate_proj"][channel].sum() + score["up_proj"][channel].sum()
            total += score["down_proj"][:, channel].sum()
            add(layer, 1, channel, total, 3 * hidden + 2 * (mlp.gate_proj.bias is not None))
    return rows


def block_extras(model: Any) -> dict[Block, int]:
    """Parameters that leave only with a whole block: its norms, and the bias of its output projection."""
    extras = {}
    for layer, block in enumerate(model.model.layers):
        norms = [block.input_layernorm, *(getattr(block.self_attn, name, None) for name in ("q_norm", "k_norm"))]
        extras[layer, 0] = sum(norm.weight.numel() for norm in norms if norm is not None)
        extras[layer, 1] = block.post_attention_layernorm.weight.numel()
        for number, output in enumerate((block.self_attn.o_proj, block.mlp.down_proj)):
            extras[layer, number] += 0 if output.bias is None else output.bias.numel()
    return extras


# Selection: over the units one after the other


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
    """Go up the ranking; channels wait until a multiple of ``round_to`` stays, the first bundle too dear ends it."""
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
