"""Notes on a pruned model in other runtimes: over how many devices it can be split, and which runtimes misread it."""

import math
from typing import Any

from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.models.families import family_of, kv_heads_of, layer_configs
from lightning_prune.models.vocabulary import EXPERTS, Block

# Families of which llama.cpp takes a layer's kind from its place: all layers but every ``period``-th have the entry
# ``usual`` under a key of the config. → key, usual, period, what these layers do.
_PATTERNS: dict[str, tuple[str, str | int, int, str]] = {
    "gemma2": ("layer_types", "sliding_attention", 2, "attend in a sliding window"),
    "gemma3_text": ("layer_types", "sliding_attention", 6, "attend in a sliding window"),
    "gpt_oss": ("layer_types", "sliding_attention", 2, "attend in a sliding window"),
    "cohere2": ("layer_types", "sliding_attention", 4, "attend in a sliding window"),
    "smollm3": ("no_rope_layers", 1, 4, "rotate queries and keys"),
}
# What vLLM splits beside KV heads, MLPs and experts, by config key: heads of mixers, and experts that every token sees.
_SPLIT_TOO = (
    *("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"),
    *("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"),
)


def pattern_note(config: Any) -> str:
    """A warning where the kept layers are not of the kinds that llama.cpp takes them for; else empty."""
    if config.model_type not in _PATTERNS:
        return ""
    key, usual, period, what = _PATTERNS[config.model_type]
    entries = getattr(config, key)
    wrong = [layer for layer, entry in enumerate(entries) if (entry == usual) == ((layer + 1) % period == 0)]
    if not wrong:
        return ""
    shown = ", ".join(map(str, wrong[:5])) + (", …" if len(wrong) > 5 else "")
    return (
        f"The layers left are out of this family's pattern: llama.cpp lets all layers but every {period}th "
        f"{what}, by their place, takes {len(wrong)} of {len(entries)} for the other kind ({shown}) and so "
        "computes another model. transformers and vLLM read the config."
    )


def tensor_parallel_sizes(config: Any, plan: PruningPlan) -> list[int]:
    """Numbers of devices over which a pruned model can be split, 1 first: common divisors of all heads and widths."""
    family, first = family_of(config), layer_configs(config)[0]
    sizes = {getattr(first, key, None) or 0 for key in _SPLIT_TOO}
    for layer in plan.layers:
        sizes |= {len(units) for block, units in layer.kept.items() if block in (Block.ATTENTION, Block.MLP)}
    if any(family.mixer.values()):  # attention is a part of it, and keeps all its heads
        sizes.add(kv_heads_of(first))
    if family.experts is not None and any(block in layer.kept for layer in plan.layers for block in EXPERTS):
        sizes.add(getattr(first, family.experts.width))
    common = math.gcd(*sizes)  # an absent block counts as 0, which every number divides
    return [size for size in range(1, common + 1) if common % size == 0]
