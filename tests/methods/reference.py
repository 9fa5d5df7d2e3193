"""A slow float64 reference of group pruning: loops, own hooks, and every prefix of the ranking tried from scratch.

Nothing of ``lightning_prune`` is used here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Unit:
    """One prunable unit; ``block`` 0 is attention, 1 the MLP."""

    layer: int
    block: int
    unit: int
    importance: float
    cost: int


def float64_weights(model: Any, layer: int) -> dict[str, np.ndarray]:
    """The seven weight matrices of a layer by their names in ``transformers``."""
    block = model.model.layers[layer]
    modules = {name: getattr(block.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    modules |= {name: getattr(block.mlp, name) for name in ("gate_proj", "up_proj", "down_proj")}
    return {name: module.weight.detach().double().numpy() for name, module in modules.items()}


def input_norms(model: Any, tokens: Tensor) -> list[dict[str, np.ndarray]]:
    """‖X_j‖₂ of every projection of every layer, one token after the other, on a float64 model."""
    found: list[dict[str, np.ndarray]] = [{} for _ in model.model.layers]
    handles = []
    for index, block in enumerate(model.model.layers):
        for name, module in [*block.self_attn.named_children(), *block.mlp.named_children()]:
            if not name.endswith("_proj"):
                continue
            found[index][name] = np.zeros(module.in_features)

            def watch(_: Any, inputs: Any, index: int = index, name: str = name) -> None:
                for token in inputs[0].detach().numpy().reshape(-1, inputs[0].shape[-1]):
                    found[index][name] += token**2

            handles.append(module.register_forward_pre_hook(watch))
    with torch.no_grad():
        for sample in tokens:
            model(input_ids=sample[None])
    for handle in handles:
        handle.remove()
    return [{name: np.sqrt(total) for name, total in layer.items()} for layer in found]


def group_units(model: Any, scores: list[dict[str, np.ndarray]]) -> list[Unit]:
    """Units of a model from per-weight scores by layer and projection: importance is the sum over a unit's weights."""
    config = model.config
    d, kv_heads = config.head_dim, config.num_key_value_heads
    r, hidden = config.num_attention_heads // kv_heads, config.hidden_size
    units = []
    for layer, score in enumerate(scores):
        attention, mlp = model.model.layers[layer].self_attn, model.model.layers[layer].mlp
        for head in range(kv_heads):
            total, cost = 0.0, 0
            for query_head in range(head * r, (head + 1) * r):
                for row in range(query_head * d, (query_head + 1) * d):
                    total += score["q_proj"][row].sum() + score["o_proj"][:, row].sum()
                    cost += 2 * hidden + (attention.q_proj.bias is not None)
            for row in range(head * d, (head + 1) * d):
                total += score["k_proj"][row].sum() + score["v_proj"][row].sum()
                cost += 2 * hidden + 2 * (attention.k_proj.bias is not None)
            units.append(Unit(layer, 0, head, total, cost))
        for channel in range(config.intermediate_size):
            total = score["gate_proj"][channel].sum() + score["up_proj"][channel].sum()
            total += score["down_proj"][:, channel].sum()
            units.append(Unit(layer, 1, channel, total, 3 * hidden + 2 * (mlp.gate_proj.bias is not None)))
    return units


def block_extras(model: Any) -> dict[tuple[int, int], int]:
    """Parameters that leave only with a whole block: its norms, and the bias of its output projection."""
    extras = {}
    for layer, block in enumerate(model.model.layers):
        norms = [block.input_layernorm, *(getattr(block.self_attn, name, None) for name in ("q_norm", "k_norm"))]
        extras[layer, 0] = sum(norm.weight.numel() for norm in norms if norm is not None)
        extras[layer, 1] = block.post_attention_layernorm.weight.numel()
        for number, output in enumerate((block.self_attn.o_proj, block.mlp.down_proj)):
            extras[layer, number] += 0 if output.bias is None else output.bias.numel()
    return extras


def cost_of(units: list[Unit], removed: set[Unit], extras: dict[tuple[int, int], int]) -> int:
    """Parameters that leave with ``removed``."""
    total = sum(unit.cost for unit in removed)
    for block, extra in extras.items():
        members = [unit for unit in units if (unit.layer, unit.block) == block]
        total += extra if members and all(unit in removed for unit in members) else 0
    return total


def greedy(
    units: list[Unit],
    budget: int,
    extras: dict[tuple[int, int], int],
    round_to: int = 1,
    frozen: tuple[int, ...] = (),
    keep: int = 0,
) -> set[Unit]:
    """The longest prefix of the ranking (importance per parameter, lowest first) whose cost fits the budget."""
    ranked = sorted(units, key=lambda unit: (unit.importance / unit.cost, unit.layer, unit.block, unit.unit))
    candidates = []
    for unit in ranked:
        better = [other for other in ranked if (other.layer, other.block) == (unit.layer, unit.block)]
        if unit.layer not in frozen and better.index(unit) < len(better) - keep:
            candidates.append(unit)
    best: set[Unit] = set()
    for length in range(len(candidates) + 1):
        removed = set(candidates[:length])
        for layer in {unit.layer for unit in units}:
            channels = [unit for unit in units if (unit.layer, unit.block) == (layer, 1)]
            gone = [unit for unit in candidates[:length] if unit in channels]
            while (len(channels) - len(gone)) % round_to and gone:
                removed.discard(gone.pop())
        if cost_of(units, removed, extras) <= budget:
            best = removed
    return best


def kept_lists(units: list[Unit], removed: set[Unit], layers: int) -> list[tuple[list[int], list[int]]]:
    """(kept KV heads, kept channels) of every layer."""

    def kept(layer: int, block: int) -> list[int]:
        return [unit.unit for unit in units if (unit.layer, unit.block) == (layer, block) and unit not in removed]

    return [(kept(layer, 0), kept(layer, 1)) for layer in range(layers)]
