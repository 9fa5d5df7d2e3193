"""The tensors of a GGUF file: names, shapes, and how each is made from those of a checkpoint."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gguf
import torch
from torch import Tensor

from lightning_prune.export.architectures import DECI, Architecture
from lightning_prune.models.checkpoint import meta_model
from lightning_prune.models.families import head_dim_of

ZERO_CHANNELS = 32  # of an MLP that is not there; a block of the quantised formats


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its name there, its shape with rows first as in PyTorch, and the parameters of the model
    that ``make`` turns into it, none where it is constant."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[..., Tensor]


def filled_config(config: Any, architecture: Architecture) -> Any:
    """The config of the model as the file has it: with blocks of zeros where the architecture cannot do without.

    An MLP that is not there becomes one of zeros, because ``deci`` drops the attention of such a layer. So does an
    attention that is not there in ``openelm``, which has one in every layer, and in layer 0, from which llama.cpp reads
    whether there is attention at all.
    """
    if not config.is_heterogeneous:
        return config
    layers = {}
    for index, own in enumerate(config.per_layer_config):
        skips = "attention" in own.skip
        may_skip = architecture == DECI and index > 0
        filled = skips and not may_skip
        layers[index] = {
            "num_attention_heads": 1 if filled else own.num_attention_heads,
            "num_key_value_heads": 1 if filled else own.num_key_value_heads,
            "intermediate_size": ZERO_CHANNELS if "mlp" in own.skip else own.intermediate_size,
            "skip": ["attention"] if skips and may_skip else [],
        }
    written = copy.deepcopy(config)
    written.per_layer_config = layers
    return written


def entries(net: Any, filled: Any, architecture: Architecture) -> Iterator[Entry]:
    """Every tensor, in the order of the layers. ``net`` is on the meta device, ``filled`` its ``filled_config``."""
    there = {name for name, _ in net.named_parameters()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name.upper()], filled.num_hidden_layers)
    head_dim, rope = head_dim_of(filled), net.config.rope_parameters
    if architecture.like_llama and rope.get("rope_type") == "llama3":
        # What the model divides each rotary frequency by.
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        factors = (plain / net.model.rotary_emb.inv_freq.double()).float()
        yield Entry("rope_freqs.weight", tuple(factors.shape), (), lambda: factors)
    shapes = {name: tuple(parameter.shape) for name, parameter in meta_model(filled).named_parameters()}
    for name, shape in shapes.items():
        role = name.split(".")[-2]
        written, make = name, _stacked
        sources: tuple[str, ...] = (name,)
        if architecture.fused and role in ("k_proj", "v_proj"):
            continue
        if architecture.fused and role == "q_proj":
            written = name.replace("q_proj", "qkv_proj")
            sources = tuple(name.replace("q_proj", f"{part}_proj") for part in "qkv")
            shape = (sum(shapes[source][0] for source in sources), *shape[1:])
        elif architecture.like_llama and role in ("q_proj", "k_proj"):
            make = partial(interleaved, head_dim=head_dim)
        if name not in there:
            if name.endswith(".bias"):
                continue
            sources, make = (), partial(torch.zeros, shape)
        yield Entry(names.get_name(written, try_suffixes=(".weight", ".bias")), shape, sources, make)


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rows ``[heads · d, …]`` whose rotary pairs are (i, i + d/2) → the same rows with pairs (2 i, 2 i + 1)."""
    pairs = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _stacked(*parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
