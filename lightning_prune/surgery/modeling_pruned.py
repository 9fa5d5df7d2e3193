"""Decoders whose layers differ in width. This file travels inside each per-layer checkpoint.

It needs only ``torch`` and ``transformers``, so
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` loads the folder on a machine that
does not have ``lightning_prune``. ``config.per_layer_config[i]`` holds what layer i has in place of the
global values: ``num_attention_heads``, ``num_key_value_heads``, ``intermediate_size``, and ``skip``, a list
with ``"attention"``, ``"mlp"`` or both. A skipped block and its norm hold no parameters; the sizes that
stand beside ``skip`` mean nothing but that loaders which ignore ``skip`` refuse the checkpoint.
"""

import copy
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn


class SkippedMLP(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(1).expand_as(hidden_states)


class SkippedMixer(nn.Module):
    """Adds nothing to the residual stream, and tells the KV cache how many tokens went by.

    transformers reads positions and mask sizes off single cache layers (the first above all), so a layer
    that left its slot empty would break left padding, chunked prefill, static caches and decoding loops.
    (The class is not called after attention: transformers searches this file for such names and would take
    ``set_attn_implementation`` away.)
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
        if past_key_values is not None:
            batch, tokens = hidden_states.shape[:2]
            heads, size = self._slot(past_key_values)
            empty = hidden_states.new_zeros(1).expand(batch, heads, tokens, size)
            past_key_values.update(empty, empty, self.layer_idx)
        return hidden_states.new_zeros(1).expand_as(hidden_states), None

    def _slot(self, past_key_values: Any) -> tuple[int, int]:
        """(heads, head size) of this layer's slot: what a static cache has allocated, else the least."""
        slots = past_key_values.layers
        keys = getattr(slots[self.layer_idx], "keys", None) if self.layer_idx < len(slots) else None
        return (keys.shape[1], keys.shape[3]) if keys is not None and keys.dim() == 4 else (1, 1)


class PrunedMixin:
    """Turns a stock ``...ForCausalLM`` into one that builds layer i from ``config.per_layer_config[i]``."""

    config: Any
    model: Any
    post_init: Any

    def __init__(self, config: Any) -> None:
        super().__init__(_uniform(config))  # type: ignore[call-arg]
        config._attn_implementation_internal = self.config._attn_implementation
        self.config = self.model.config = config
        layer_class = type(self.model.layers[0])
        self.model.layers = nn.ModuleList(
            _build_layer(layer_class, own, index) for index, own in enumerate(config.per_layer_config)
        )
        self.post_init()

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and for the configs of the layers too, which are their own."""
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        for module in self.model.layers.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = self.config._attn_implementation


def _uniform(config: Any) -> Any:
    """A copy of ``config`` with one layer of the global widths: enough for embeddings, rotary and head."""
    uniform = copy.deepcopy(config)
    uniform.per_layer_config = None
    uniform.num_hidden_layers = 1
    return uniform


def _build_layer(layer_class: type[nn.Module], config: Any, index: int) -> nn.Module:
    layer: Any = layer_class(config, index)
    if "attention" in config.skip:
        layer.self_attn, layer.input_layernorm = SkippedMixer(index), nn.Identity()
    if "mlp" in config.skip:
        layer.mlp, layer.post_attention_layernorm = SkippedMLP(), nn.Identity()
    return layer  # type: ignore[no-any-return]


@cache
def pruned_class(name: str) -> Any:
    """The class ``name`` of transformers (``LlamaForCausalLM``, …) with per-layer widths, under its own name.

    The name stays because pipelines and other tools look classes up by it.
    """
    made: Any = type(name, (PrunedMixin, getattr(transformers, name)), {"__module__": __name__})
    made.register_for_auto_class("AutoModelForCausalLM")
    return made


def __getattr__(name: str) -> Any:
    # ``auto_map`` in config.json asks this module for "LlamaForCausalLM" and the like.
    if name.endswith("ForCausalLM") and hasattr(transformers, name):
        return pruned_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
