"""The tensors of a GGUF file: names, shapes, and how each is made from those of a checkpoint."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.export.architectures import Architecture, rope_of
from lightning_prune.models.families import head_dim_of

# Below a decoder layer, in all exported families.
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
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
    make: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Widths:
    """What a layer of the file has: query heads, KV heads, MLP channels. Heads of 0: no attention."""

    heads: int
    kv_heads: int
    channels: int


def widths(config: Any, architecture: Architecture) -> list[Widths]:
    """The widths of every layer in the file.

    An MLP that is not there becomes one of zeros, because ``deci`` drops the attention of such a layer. So does an
    attention that is not there in ``openelm``, which has one in every layer, and in layer 0, from which llama.cpp reads
    whether there is attention at all.
    """
    if not config.is_heterogeneous:
        layer = Widths(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
        return [layer] * config.num_hidden_layers
    found = []
    for index, own in enumerate(config.per_layer_config):
        heads, kv_heads = own.num_attention_heads, own.num_key_value_heads
        if "attention" in own.skip:
            heads = kv_heads = 0 if architecture.name == "deci" and index else 1
        found.append(Widths(heads, kv_heads, ZERO_CHANNELS if "mlp" in own.skip else own.intermediate_size))
    return found


def entries(net: Any, architecture: Architecture) -> Iterator[Entry]:
    """Every tensor, in the order of the layers.

    Args:
        net: the model, on the meta device.
        architecture: that holds it.
    """
    parameters = dict(net.named_parameters(remove_duplicate=False))
    yield _copy(OUTSIDE["model.embed_tokens.weight"], "model.embed_tokens.weight", parameters)
    factors = frequency_factors(net, architecture)
    if factors is not None:
        yield Entry("rope_freqs.weight", tuple(factors.shape), (), lambda _: factors)
    for index, width in enumerate(widths(net.config, architecture)):
        yield from _layer(index, width, parameters, architecture, net.config)
    yield _copy(OUTSIDE["model.norm.weight"], "model.norm.weight", parameters)
    if net.get_output_embeddings().weight is not net.get_input_embeddings().weight:
        yield _copy(OUTSIDE["lm_head.weight"], "lm_head.weight", parameters)


def frequency_factors(net: Any, architecture: Architecture) -> Tensor | None:
    """What the model divides each rotary frequency by, fp32 ``[d / 2]``, where the architecture has no other words
    for its scaling."""
    kind, parameters = rope_of(net.config)
    if kind != "llama3" or not architecture.frequency_factors:
        return None
    dim = head_dim_of(net.config)
    plain = 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    factors: Tensor = plain / net.model.rotary_emb.inv_freq.double()
    return factors.float()


def _layer(
    index: int, width: Widths, parameters: dict[str, Any], architecture: Architecture, config: Any
) -> Iterator[Entry]:
    prefix, stem, dim = f"model.layers.{index}.", f"blk.{index}.", head_dim_of(config)
    there = {name.removeprefix(prefix): tuple(parameters[name].shape) for name in parameters if name.startswith(prefix)}
    missing = {name: shape for name, shape in _weights(width, config).items() if name not in there}
    shapes = there | missing
    for name, shape in shapes.items():
        part, _, kind = name.rpartition(".")
        sources: tuple[str, ...] = () if name in missing else (prefix + name,)
        if architecture.fused and part in FUSED:
            if part == FUSED[0]:
                group = [f"{other}.{kind}" for other in FUSED]
                whole = (sum(shapes[other][0] for other in group), *shape[1:])
                sources = tuple(prefix + other for other in group) if sources else ()
                yield Entry(f"{stem}attn_qkv.{kind}", whole, sources, _stack if sources else _Zeros(whole))
            continue
        turn = architecture.interleaved and part in FUSED[:2]
        make = (_Interleaved(dim) if turn else _same) if sources else _Zeros(shape)
        yield Entry(f"{stem}{NAMES[part]}.{kind}", shape, sources, make)


def _weights(width: Widths, config: Any) -> dict[str, tuple[int, ...]]:
    """Name below the layer → shape of every weight that the file has in a layer, whether the model has it or not."""
    hidden, dim = config.hidden_size, head_dim_of(config)
    rows, kv_rows = width.heads * dim, width.kv_heads * dim
    found: dict[str, tuple[int, ...]] = {}
    if width.heads:
        found |= {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (rows, hidden),
            "self_attn.k_proj": (kv_rows, hidden),
            "self_attn.v_proj": (kv_rows, hidden),
            "self_attn.o_proj": (hidden, rows),
        }
        if config.model_type == "qwen3":
            found |= {"self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,)}
    found |= {
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (width.channels, hidden),
        "mlp.up_proj": (width.channels, hidden),
        "mlp.down_proj": (hidden, width.channels),
    }
    return {f"{part}.weight": shape for part, shape in found.items()}


def _copy(name: str, source: str, parameters: dict[str, Any]) -> Entry:
    return Entry(name, tuple(parameters[source].shape), (source,), _same)


def _same(found: Sequence[Tensor]) -> Tensor:
    return found[0]


def _stack(found: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(found))


@dataclass(frozen=True)
class _Interleaved:
    """Rows ``[heads · d, …]`` whose rotary pairs are (i, i + d/2) → the same rows with pairs (2 i, 2 i + 1)."""

    head_dim: int

    def __call__(self, found: Sequence[Tensor]) -> Tensor:
        rows = found[0]
        pairs = rows.reshape(-1, 2, self.head_dim // 2, *rows.shape[1:])
        return pairs.transpose(1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class _Zeros:
    """Zeros where a weight is missing. A norm of zeros is one too: what it scales is multiplied by zeros anyway."""

    shape: tuple[int, ...]

    def __call__(self, found: Sequence[Tensor]) -> Tensor:
        return torch.zeros(self.shape)
