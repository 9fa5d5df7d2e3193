"""What a model takes and costs in use, from shapes alone: memory with a KV cache, and the work of one token."""

from collections.abc import Sequence
from typing import Any

from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.methods.target import memory_bytes
from lightning_prune.models.families import LayerStructure

CONTEXTS = (2_048, 32_768)  # tokens; a conversation, and a long document


def footprint(
    layers: Sequence[LayerStructure], config: Any, kept: Sequence[LayerPlan], sizes: tuple[int, int], itemsize: int
) -> dict[str, Any]:
    """``memory_bytes`` by context, of weights and the KV cache of one sequence, and ``flops_per_token``: two operations
    per active parameter but those of an input embedding of its own, which is looked up, without attention's products.

    Args:
        layers, config: of the dense model; ``kept``: of every layer.
        sizes: parameters that are left, and those of them that one token passes.
        itemsize: bytes of a number in the file, and in the cache.
    """
    left, active = sizes
    longest = getattr(config, "max_position_embeddings", None) or max(CONTEXTS)
    contexts = sorted({min(one, longest) for one in CONTEXTS})
    memory = {context: memory_bytes(left, layers, kept, config, context, 1, itemsize) for context in contexts}
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return {"memory_bytes": memory, "flops_per_token": 2 * (active - embedding)}
