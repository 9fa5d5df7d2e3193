"""A model as one GGUF file, the format of llama.cpp and of everything built on it."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_prune.export.architectures import Architecture, architecture_of, rope_of, window_of
from lightning_prune.export.gguf_tensors import Entry, entries, widths
from lightning_prune.export.vocabulary import Vocabulary, read_vocabulary
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import head_dim_of, layers_of
from lightning_prune.models.sources import CheckpointSource
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import temporary

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
QUANTISED = "q8_0"
BLOCK = 32  # numbers of a row that share a scale in q8_0
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
        output: the file; it takes its name when it is complete, and what stood there is replaced then.
        dtype: of the matrices: ``f32``, ``f16``, ``bf16`` or ``q8_0``; vectors are always fp32.
        progress: told the name of every tensor that has been written, and the bytes so far and in all.

    Raises:
        UserError: the ``gguf`` package is missing, the model or its tokenizer cannot be held by any architecture, or a
            weight does not fit into f16.
        OSError: the file cannot be written; nothing is left behind.
    """
    gguf = gguf_package()
    net, source = checkpoint.skeleton(), checkpoint.source()
    config: Any = net.config
    biases = {name.split(".")[-2] for name, _ in layers_of(net).named_parameters() if name.endswith(".bias")}
    architecture = architecture_of(config, biases)
    ends = getattr(checkpoint.generation_config, "eos_token_id", None)
    vocabulary = read_vocabulary(
        checkpoint, config.vocab_size, ends if isinstance(ends, list) else [] if ends is None else [ends]
    )
    tensors = list(entries(net, architecture))
    types = [_type(gguf, entry, dtype) for entry in tensors]

    writer = gguf.GGUFWriter(None, architecture.name)
    _describe(gguf, writer, config, architecture, checkpoint.pretrained, dtype)
    _speak(gguf, writer, vocabulary)
    sizes = [_bytes(gguf, entry, kind) for entry, kind in zip(tensors, types, strict=True)]
    for entry, kind, size in zip(tensors, types, sizes, strict=True):
        writer.add_tensor_info(entry.name, entry.shape, "float32", size, raw_dtype=kind)
    with temporary(output) as partial:
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for entry, kind, size in zip(tensors, types, sizes, strict=True):
                writer.write_tensor_data(_values(gguf, entry, kind, source))
                done += size
                progress(entry.name, done, sum(sizes))
        finally:
            writer.close()
            source.close()
        os.replace(partial, output)
    left = sum(kind == gguf.GGMLQuantizationType.F16 for kind in types) if dtype == QUANTISED else 0
    return Written(architecture.name, left, window_of(config))


def gguf_package() -> ModuleType:
    """The package that knows the file format.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf

        package: ModuleType = gguf
    except ImportError:
        raise UserError(
            "--format gguf needs the package 'gguf'. Install it with: pip install 'lightning-prune[gguf]'"
        ) from None
    return package


def _describe(
    gguf: ModuleType, writer: Any, config: Any, architecture: Architecture, pretrained: str, dtype: str
) -> None:
    layers = widths(config, architecture)
    dim = head_dim_of(config)
    window = window_of(config)
    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", QUANTISED: "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(Path(pretrained).resolve().name)
    writer.add_file_type(gguf.LlamaFileType[file_type[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(min(config.max_position_embeddings, window or sys.maxsize))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    for add, counts in (
        (writer.add_head_count, [layer.heads for layer in layers]),
        (writer.add_head_count_kv, [layer.kv_heads for layer in layers]),
        (writer.add_feed_forward_length, [layer.channels for layer in layers]),
    ):
        add(counts if architecture.per_layer else counts[0])
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _describe_rope(gguf, writer, config)


def _describe_rope(gguf: ModuleType, writer: Any, config: Any) -> None:
    kind, parameters = rope_of(config)
    writer.add_rope_freq_base(float(parameters["rope_theta"]))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(parameters["factor"]))
    if kind == "yarn":
        factor = float(parameters["factor"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        length = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(length))
        writer.add_rope_scaling_yarn_beta_fast(float(parameters.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(parameters.get("beta_slow") or 1))


def _speak(gguf: ModuleType, writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space)
    for name, token in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _type(gguf: ModuleType, entry: Entry, dtype: str) -> Any:
    """Vectors stay fp32, as everywhere in this format; a row that q8_0 cannot divide goes to f16."""
    types = gguf.GGMLQuantizationType
    if len(entry.shape) == 1:
        return types.F32
    if dtype == QUANTISED:
        return types.Q8_0 if entry.shape[-1] % BLOCK == 0 else types.F16
    return types[dtype.upper()]


def _bytes(gguf: ModuleType, entry: Entry, kind: Any) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(torch.Size(entry.shape).numel() // block * size)


def _values(gguf: ModuleType, entry: Entry, kind: Any, source: CheckpointSource) -> Any:
    """The tensor as a numpy array of the file's bytes."""
    import numpy as np

    read = source.read(entry.sources, None, torch.device("cpu"))
    tensor = entry.make([read[name] for name in entry.sources])
    if kind == gguf.GGMLQuantizationType.Q8_0:
        parts = [gguf.quants.quantize(rows.float().numpy(), kind) for rows in tensor.split(ROWS)]
        return np.concatenate(parts)
    return _cast(entry, tensor, DTYPES[kind.name.lower()]).contiguous().view(torch.uint8).flatten().numpy()


def _cast(entry: Entry, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(cast).all():
        raise UserError(
            f"--dtype: {_sources(entry.sources)} has values that f16 cannot hold (beyond 65504). "
            "Choose --dtype bf16 or f32."
        )
    return cast


def _sources(names: Sequence[str]) -> str:
    return " and ".join(repr(name) for name in names)
