"""Decoders whose layers differ in width. This file is copied into each per-layer checkpoint.

It needs only ``torch`` and ``transformers`` (5.14 and later), so that any class of ``CLASSES`` loads the folder with
``from_pretrained(folder, trust_remote_code=True)`` where ``lightning_prune`` is not installed.
``config.per_layer_config[i]`` holds what layer i has in place of the global values: ``num_attention_heads``,
``num_key_value_heads``, ``intermediate_size``, and ``skip``, a list with ``"attention"``, ``"mlp"`` or both. A skipped
block and its norm hold no parameters; the sizes beside ``skip`` only make loaders that ignore ``skip`` refuse the
checkpoint. ``config.block_norms`` and ``config.block_modules`` name the norms and the module of each block where they
are not Llama's.
"""

import copy
import inspect
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto

BLOCK_NORMS = {"attention": ["input_layernorm"], "mlp": ["post_attention_layernorm"]}
BLOCK_MODULES = {"attention": "self_attn", "mlp": "mlp"}
# In config.json, where a reader looks whose loader reports mismatched sizes.
HOW_TO_LOAD = "Layers differ in width: pass trust_remote_code=True, or sizes do not match. README.md has the commands."
# What a checkpoint is loaded through → model type → class. Not every family has the last two.
CLASSES = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}


class SkippedMLP(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(1).expand_as(hidden_states)


class SkippedMixer(nn.Module):
    """Adds nothing to the residual stream, and tells the KV cache how many tokens were processed.

    transformers reads positions and mask sizes from single cache layers, so an empty slot would break left padding,
    chunked prefill, static caches and decoding loops. (The class is not named after attention: transformers searches
    this file for such names and would disable ``set_attn_implementation``.)

    vLLM refuses a layer in which no module calls an attention function of transformers. It reads the source of
    ``forward`` for one such call, and ``config`` and ``layer_idx``; the call need not be reached.
    """

    def __init__(self, layer_idx: int, head_dim: int, config: Any = None) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.config = config
        self.head_dim = head_dim

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Arguments are recognised by their kind: transformers renames keywords in minor releases."""
        inputs = (*args, *kwargs.values())
        hidden_states = next(x for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 3)
        kv_cache = next((x for x in inputs if _is_kv_cache(x)), None)
        if kv_cache is not None:
            batch, tokens = hidden_states.shape[:2]
            heads, size = self._slot(kv_cache)
            empty = hidden_states.new_zeros(1).expand(batch, heads, tokens, size)
            kv_cache.update(empty, empty, self.layer_idx)
        if False:  # only to be read, see above: attending with zeros would cost time and add zeros
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            attend(self, hidden_states, hidden_states, hidden_states, None)
        return hidden_states.new_zeros(1).expand_as(hidden_states), None

    def _slot(self, kv_cache: Any) -> tuple[int, int]:
        """(heads, head size) for this layer's slot: what a static cache has allocated, one whole head where the
        slot quantises in groups along it, else the least."""
        slot = dict(enumerate(kv_cache.layers)).get(self.layer_idx)
        keys = getattr(slot, "keys", None)
        if keys is not None and keys.dim() == 4:
            return keys.shape[1], keys.shape[3]
        return 1, self.head_dim if hasattr(slot, "_quantize") else 1


def _is_kv_cache(value: Any) -> bool:
    """Any ``transformers.Cache``: one slot per layer, filled by ``update(keys, values, layer_idx)``. The paged cache
    of continuous batching has no slots and is given positions, so it needs no update."""
    return all(hasattr(value, name) for name in ("layers", "update", "get_seq_length"))


class PrunedMixin:
    """Turns a stock decoder, alone or under a head, into one with layers as ``config.per_layer_config`` says."""

    config: Any
    layers: Any
    base_model: Any
    base_model_prefix: str
    post_init: Any

    def __init__(self, config: Any) -> None:
        if hasattr(config, "kept_layer_types"):  # the config of Gemma 4 makes the last layer attend fully
            config.layer_types = config.kept_layer_types
        super().__init__(_uniform(config))  # type: ignore[call-arg]
        config._attn_implementation_internal = self.config._attn_implementation
        config._experts_implementation_internal = self.config._experts_implementation
        self.config = config
        if self.base_model is self:
            stock = self.layers[0]
            self.layers = nn.ModuleList(
                _build_layer(stock, own, index) for index, own in enumerate(config.per_layer_config)
            )
        else:
            decoder = pruned_class(type(self.base_model).__name__)(config)
            setattr(self, self.base_model_prefix, decoder)
        self.post_init()

    def _initialize_weights(self, module: nn.Module, *args: Any) -> None:
        """Initialise like a class of transformers, which skips for custom code what a decoder computes for its layers
        (the multipliers of Falcon H1)."""
        super()._initialize_weights(module)  # type: ignore[misc]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Answer of the stock class: transformers would search this file for its decorator of experts."""
        stock: Any = next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))
        return bool(stock._can_set_experts_implementation())

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Set the attention implementation of the model and of its layers, which have configs of their own."""
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        for module in self.base_model.layers.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = self.config._attn_implementation

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model with this file and a config that leads loaders to it (``identity``)."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        file = Path(save_directory) / "config.json"
        if file.is_file():  # adapters are saved without one
            config = json.loads(file.read_text("utf-8")) | identity(type(self).__name__)
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def identity(class_name: str) -> dict[str, Any]:
    """The keys of ``config.json`` by which loaders find this file, for the model class ``class_name``.

    ``architectures`` is a unique name: an engine with a Llama of its own would take ``LlamaForCausalLM`` for that one
    and fail on the first narrow layer. Classes keep the stock names, by which pipelines look models up.
    """
    model_type = getattr(transformers, class_name).config_class.model_type
    return {
        "how_to_load": HOW_TO_LOAD,
        "architectures": [f"Pruned{class_name}"],
        "auto_map": {auto: f"{__name__.rpartition('.')[2]}.{name}" for auto, name in classes_of(model_type).items()},
    }


def classes_of(model_type: str) -> dict[str, str]:
    """Classes of transformers that a checkpoint of this family can be loaded as, by the auto class that does it."""
    return {auto: names[model_type] for auto, names in CLASSES.items() if model_type in names}


def _uniform(config: Any) -> Any:
    """A copy of ``config`` with one layer of the global widths: enough for embeddings, rotary and head. Gemma 4 needs
    them all, of their head sizes: its loop counts them, and it has a rotary table for each size."""
    uniform = copy.deepcopy(config)
    uniform.per_layer_config = None
    uniform.__dict__.pop("auto_map", None)  # a classifier makes its decoder through AutoModel, which would ask
    if hasattr(config, "num_kv_shared_layers"):
        heads = {index: {"head_dim": own.head_dim} for index, own in enumerate(config.per_layer_config)}
        uniform.per_layer_config = heads
    else:
        uniform.num_hidden_layers = 1
    return uniform


def _build_layer(stock: nn.Module, config: Any, index: int) -> nn.Module:
    """Layer ``index``; ``stock``: a layer that the stock model has made, maybe with buffers of its own."""
    wanted = inspect.signature(type(stock).__init__).parameters
    kind = {"layer_type": config.layers_block_type[index]} if "layer_type" in wanted else {}
    classes = getattr(sys.modules[type(stock).__module__], "ALL_DECODER_LAYER_TYPES", None)  # of Jamba
    made = classes[config.layers_block_type[index]] if classes else type(stock)
    layer: Any = made(config, index, **kind)
    there = {name for name, _ in layer.named_buffers()}
    for name, buffer in stock.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if name not in there and owner in dict(layer.named_modules()):
            layer.get_submodule(owner).register_buffer(leaf, buffer.clone(), persistent=False)
    for block in config.skip:
        module = getattr(config, "block_modules", BLOCK_MODULES)[block]
        attention = block == "attention"
        dim = getattr(layer, module).head_dim if attention else 0
        setattr(layer, module, SkippedMixer(index, dim, config) if attention else SkippedMLP())
        for name in getattr(config, "block_norms", BLOCK_NORMS)[block]:
            setattr(layer, name, nn.Identity())
    return layer  # type: ignore[no-any-return]


@cache
def pruned_class(name: str) -> Any:
    """The class ``name`` of transformers (``LlamaForCausalLM``, ``LlamaModel``, …) with per-layer widths."""
    made: Any = type(name, (PrunedMixin, getattr(transformers, name)), {"__module__": __name__})
    made.register_for_auto_class(_auto_class(name))
    return made


def _auto_class(name: str) -> str:
    """``LlamaModel`` → ``AutoModel``, ``LlamaForCausalLM`` → ``AutoModelForCausalLM``; nothing for other names."""
    _, found, head = name.partition("For")
    return f"AutoModelFor{head}" if found else "AutoModel" if name.endswith("Model") else ""


def __getattr__(name: str) -> Any:
    # ``auto_map`` in config.json asks this module for "LlamaForCausalLM" and the like.
    if _auto_class(name) in CLASSES and hasattr(transformers, name):
        return pruned_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
