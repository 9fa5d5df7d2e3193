"""A model as one GGUF file, the format of llama.cpp and of everything built on it."""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from lightning_prune.formats.architectures import DECI, Architecture, architecture_of
from lightning_prune.formats.vocabulary import add_vocabulary
from lightning_prune.models.checkpoint import Checkpoint, meta_model
from lightning_prune.models.families import head_dim_of, layers_of
from lightning_prune.models.sources import CheckpointSource
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import temporary
from lightning_prune.support.progress import Progress

# What the command calls a dtype → the format's type of a file whose matrices have it.
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
STORED = {torch.float16: "f16", torch.bfloat16: "bf16"}
ROWS = 4096  # converted at a time
ZERO_CHANNELS = 32  # of an MLP that is not there; a block of the quantised formats


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its name there, its shape with rows first as in PyTorch, and the parameters of the model
    that ``make`` turns into it, none where it is constant."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[..., Tensor]


def write_gguf(checkpoint: Checkpoint, output: Path, dtype: str | None, progress: Progress) -> str:
    """``export`` for the format gguf: one tensor is in memory at a time.

    Raises:
        UserError: the model or its tokenizer cannot be held by any architecture, or a weight does not fit into f16.
        OSError: the file cannot be written; nothing is left of it.
    """
    dtype = dtype or STORED.get(checkpoint.stored_dtype, "f32")
    net, source = checkpoint.skeleton(), checkpoint.source()
    config: Any = net.config
    biases = {name.split(".")[-2] for name, _ in layers_of(net).named_parameters() if name.endswith(".bias")}
    architecture = architecture_of(config, biases)
    filled = filled_config(config, architecture)
    writer: Any = gguf.GGUFWriter(None, architecture.name)
    types = getattr(config, "layer_types", None)
    everywhere = types is not None and "sliding_attention" not in types
    window = None if everywhere else getattr(config, "sliding_window", None)  # tokens that some layer reaches back
    _describe(writer, filled, architecture, window)
    writer.add_name(Path(checkpoint.pretrained).resolve().name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    add_vocabulary(writer, checkpoint, config.vocab_size)

    tensors = [(entry, _type(entry, dtype)) for entry in entries(net, filled, architecture)]
    sizes = []
    for entry, kind in tensors:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        sizes.append(torch.Size(entry.shape).numel() // block * size)
        writer.add_tensor_info(entry.name, entry.shape, "float32", sizes[-1], raw_dtype=kind)
    phase = f"writing {output.name}"
    progress.expect(phase, sum(sizes))
    with temporary(output) as unfinished:
        try:
            writer.write_header_to_file(unfinished)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for (entry, kind), size in zip(tensors, sizes, strict=True):
                writer.write_tensor_data(_values(entry, kind, source))
                progress.advance(phase, size)
        finally:
            writer.close()
            source.close()
        os.replace(unfinished, output)
    progress.finish(phase)
    lines = []
    if dtype == "q8_0" and (left := sum(kind == gguf.GGMLQuantizationType.F16 for _, kind in tensors)):
        lines.append(
            f"{left} matrices are in f16: the length of their rows is not a multiple of 32, which q8_0 "
            "needs. --model.round_to 32 (fit) makes widths that are."
        )
    if window is not None and window < config.max_position_embeddings:
        lines.append(f"the context is {window} tokens, the model's sliding window: the format has none for it.")
    return "\n".join([*lines, f"GGUF file ({architecture.name}, {dtype}): {output}"])


def _describe(writer: Any, config: Any, architecture: Architecture, window: int | None) -> None:
    layers = config.per_layer_config if config.is_heterogeneous else [config]
    dim = head_dim_of(config)
    writer.add_type("model")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(min(config.max_position_embeddings, window or sys.maxsize))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    attends = [not (architecture.per_layer and "attention" in own.skip) for own in layers]
    for add, counts in (
        (writer.add_head_count, [own.num_attention_heads * on for own, on in zip(layers, attends, strict=True)]),
        (writer.add_head_count_kv, [own.num_key_value_heads * on for own, on in zip(layers, attends, strict=True)]),
        (writer.add_feed_forward_length, [own.intermediate_size for own in layers]),
    ):
        add(counts if architecture.per_layer else counts[0])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        length = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(length))
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))


def _type(entry: Entry, dtype: str) -> gguf.GGMLQuantizationType:
    """Type of a tensor in the file: fp32 for vectors, as always in this format; f16 for rows that q8_0 cannot
    divide."""
    types = gguf.GGMLQuantizationType
    if len(entry.shape) == 1:
        return types.F32
    kind = types[dtype.upper()]
    return kind if entry.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else types.F16


def _values(entry: Entry, kind: gguf.GGMLQuantizationType, source: CheckpointSource) -> Any:
    """The tensor as a numpy array of the file's numbers."""
    read = source.read(entry.sources, None, torch.device("cpu"))
    tensor = entry.make(*(read[name] for name in entry.sources))
    with np.errstate(over="ignore"):  # reported below
        values = np.concatenate([gguf.quants.quantize(rows.float().numpy(), kind) for rows in tensor.split(ROWS)])
    if kind == gguf.GGMLQuantizationType.F16 and not np.isfinite(values).all():
        raise UserError(
            f"--dtype: {' and '.join(map(repr, entry.sources))} has values that f16 cannot hold (beyond 65504). "
            "Choose --dtype bf16 or f32."
        )
    return values


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
