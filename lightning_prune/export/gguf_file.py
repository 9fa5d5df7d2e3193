"""A model as one GGUF file, the format of llama.cpp and of everything built on it."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from lightning_prune.export.architectures import Architecture, architecture_of
from lightning_prune.export.gguf_tensors import Entry, entries, filled_config
from lightning_prune.export.vocabulary import add_vocabulary
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import head_dim_of, layers_of
from lightning_prune.models.sources import CheckpointSource
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import temporary

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
ROWS = 4096  # converted at a time


@dataclass(frozen=True)
class Written:
    """What was written: the architecture, how many matrices q8_0 could not hold, and the window that shortened the
    context, if one did."""

    architecture: str
    left_in_f16: int
    window: int | None


def write_gguf(
    checkpoint: Checkpoint, output: Path, dtype: str, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Written:
    """Write a dense or pruned checkpoint as a GGUF file, one tensor in memory at a time.

    Args:
        checkpoint: a dense or pruned model.
        output: the file; it takes its name when it is complete, and replaces what was there then.
        dtype: of the matrices: ``f32``, ``f16``, ``bf16`` or ``q8_0``; vectors are always fp32.
        progress: told the name of every tensor that has been written, and the bytes so far and in all.

    Raises:
        UserError: the ``gguf`` package is missing, the model or its tokenizer cannot be held by any architecture, or a
            weight does not fit into f16.
        OSError: the file cannot be written; nothing is left of it.
    """
    gguf = gguf_package()
    net, source = checkpoint.skeleton(), checkpoint.source()
    config: Any = net.config
    biases = {name.split(".")[-2] for name, _ in layers_of(net).named_parameters() if name.endswith(".bias")}
    architecture = architecture_of(config, biases)
    filled = filled_config(config, architecture)
    writer = gguf.GGUFWriter(None, architecture.name)
    window = _window_of(config)
    _describe(gguf, writer, filled, architecture, window)
    writer.add_name(Path(checkpoint.pretrained).resolve().name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    ends = getattr(checkpoint.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    add_vocabulary(gguf, writer, checkpoint, config.vocab_size, ends)

    tensors = [(entry, _type(gguf, entry, dtype)) for entry in entries(gguf, net, filled, architecture)]
    sizes = []
    for entry, kind in tensors:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        sizes.append(torch.Size(entry.shape).numel() // block * size)
        writer.add_tensor_info(entry.name, entry.shape, "float32", sizes[-1], raw_dtype=kind)
    with temporary(output) as partial:
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, (entry, kind) in enumerate(tensors, start=1):
                writer.write_tensor_data(_values(gguf, entry, kind, source))
                progress(entry.name, sum(sizes[:done]), sum(sizes))
        finally:
            writer.close()
            source.close()
        os.replace(partial, output)
    left = sum(kind == gguf.GGMLQuantizationType.F16 for _, kind in tensors) if dtype == "q8_0" else 0
    return Written(architecture.name, left, window)


def gguf_package() -> ModuleType:
    """The package that knows the file format.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(
            "--format gguf needs the package 'gguf'. Install it with: pip install 'lightning-prune[gguf]'"
        ) from None
    return gguf  # type: ignore[no-any-return]


def _window_of(config: Any) -> int | None:
    """Tokens that attention reaches back in the layers with a sliding window; None where no layer has one."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    return None if types is not None and "sliding_attention" not in types else window


def _describe(gguf: ModuleType, writer: Any, config: Any, architecture: Architecture, window: int | None) -> None:
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
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
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


def _type(gguf: ModuleType, entry: Entry, dtype: str) -> Any:
    """Vectors stay fp32, as everywhere in this format; a row that q8_0 cannot divide goes to f16."""
    types = gguf.GGMLQuantizationType
    if len(entry.shape) == 1:
        return types.F32
    kind = types[dtype.upper()]
    return kind if entry.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else types.F16


def _values(gguf: ModuleType, entry: Entry, kind: Any, source: CheckpointSource) -> Any:
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
