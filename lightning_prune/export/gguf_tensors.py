"""The tensors of a GGUF file: names, shapes, and how each is made from those of a checkpoint."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_prune.export.architectures import DECI, Architecture
from lightning_prune.models.checkpoint import meta_model
from lightning_prune.models.families import head_dim_of

ZERO_CHANNELS = 32  # of an MLP that is not there; a block of the quantised formats


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: in the file.
        shape: rows first, as in PyTorch.
        sources: parameters of the model it is made from; none where it is constant.
        make: from the sources to the tensor.
    """

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
        heads, kv_heads, channels = own.num_attention_heads, own.num_key_value_heads, own.intermediate_size
        skip = []
        if "attention" in own.skip:
            if architecture == DECI and index:
                skip = ["attention"]
            else:
                heads = kv_heads = 1
        if "mlp" in own.skip:
            channels = ZERO_CHANNELS
        layers[index] = {
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": channels,
            "skip": skip,
        }
    filled = copy.deepcopy(config)
    filled.per_layer_config = layers
    return filled


def entries(gguf: Any, net: Any, filled: Any, architecture: Architecture) -> Iterator[Entry]:
    """Every tensor, in the order of the layers.

    Args:
        gguf: the package, which knows the names.
        net: the model, on the meta device.
        filled: its ``filled_config``.
        architecture: that holds it.
    """
    there = {name for name, _ in net.named_parameters()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name.upper()], filled.num_hidden_layers)
    factors = frequency_factors(net) if architecture.like_llama else None
    if factors is not None:
        yield Entry("rope_freqs.weight", tuple(factors.shape), (), lambda: factors)
    parameters = {name: tuple(parameter.shape) for name, parameter in meta_model(filled).named_parameters()}
    for name, shape in parameters.items():
        sources: tuple[str, ...] = (name,)
        make: Callable[..., Tensor] = _same
        written = name
        if ".q_proj." in name or ".k_proj." in name or ".v_proj." in name:
            if architecture.fused:
                if ".q_proj." not in name:
                    continue
                sources = tuple(name.replace(".q_proj.", f".{one}_proj.") for one in "qkv")
                shape = (sum(parameters[source][0] for source in sources), *shape[1:])
                make, written = _stack, name.replace(".q_proj.", ".qkv_proj.")
            elif architecture.like_llama and ".v_proj." not in name:
                make = partial(interleaved, head_dim=head_dim_of(filled))
        if name not in there:
            if name.endswith(".bias"):
                continue
            sources, make = (), partial(torch.zeros, shape)
        yield Entry(names.get_name(written, try_suffixes=(".weight", ".bias")), shape, sources, make)


def frequency_factors(net: Any) -> Tensor | None:
    """What the model divides each rotary frequency by, fp32 ``[d / 2]``, where it is scaled as in Llama 3."""
    rope = net.config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    dim = head_dim_of(net.config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    factors: Tensor = plain / net.model.rotary_emb.inv_freq.double()
    return factors.float()


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rows ``[heads · d, …]`` whose rotary pairs are (i, i + d/2) → the same rows with pairs (2 i, 2 i + 1)."""
    pairs = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _same(rows: Tensor) -> Tensor:
    return rows


def _stack(*parts: Tensor) -> Tensor:
    return torch.cat(parts)
