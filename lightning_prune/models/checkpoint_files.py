"""What a checkpoint holds, from its safetensors headers alone, and whether that is what its config asks for."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from lightning_prune.models.safetensors_header import (
    HEADER_LIMIT,
    OPTION,
    TensorEntry,
    first_line,
    no_duplicates,
    read_header,
)
from lightning_prune.support.errors import UserError
from lightning_prune.support.regular_files import require_regular

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Old Llama checkpoints store the rotary table of every layer; it is computed from the config.
COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# The text model's tensors within a checkpoint of several models, and what they are called by themselves.
TEXT_NAMES = {
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}
LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")


@dataclass(frozen=True)
class CheckpointFiles:
    """The tensors of one checkpoint by the names they are stored under; nothing but headers has been read.

    Attributes:
        source: folder or hub id, for messages.
        config_path: its ``config.json``.
        tensors: every tensor of every weight file; of several models in one, those of the text model.
    """

    source: str
    config_path: Path
    tensors: Mapping[str, TensorEntry]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.end - entry.start for entry in self.tensors.values())

    @property
    def is_part(self) -> bool:
        """Whether this is the text model of a checkpoint that holds others too."""
        return any(_text_name(name) != name for name in self.tensors)

    @property
    def num_layers(self) -> int:
        """Decoder layers that the names speak of. A count, since a name may claim any index."""
        return len({found[1] for name in self.tensors if (found := LAYER.search(name))})

    def check_layers(self, num_hidden_layers: int) -> None:
        """Compare a config's layer count with the names, before a model of that many layers is built.

        Raises:
            UserError: they differ.
        """
        if num_hidden_layers != self.num_layers:
            raise UserError(
                f"{OPTION}: the config of '{self.source}' says num_hidden_layers {num_hidden_layers}, but its weights "
                f"have {self.num_layers} layers. Give a config.json that belongs to these weights."
            )

    def check_against(self, model: nn.Module) -> dict[str, str]:
        """Compare names, shapes and kinds of numbers with what a model (on the meta device) expects.

        Harmless and allowed: rotary tables, ``model.`` left out or doubled, and a tied head stored as a copy.

        Returns:
            Every parameter of ``model`` (tied ones under all their names) -> the name its values are stored under.

        Raises:
            UserError: tensors are missing, left over, stored twice, of another shape, quantised, or a tied head's
                copy differs from the embedding.
        """
        expected = dict(model.named_parameters(remove_duplicate=False))
        names = self._own_names(expected)
        self._refuse("are not part of the model that its config describes", sorted(set(self.tensors) - set(names)))
        stored = {parameter: name for name, parameter in names.items() if parameter is not None}
        for tied in _tied_names(expected):
            there = [name for name in tied if name in stored]
            if len(there) > 1:
                self._check_copies(stored[there[0]], stored[there[1]])
            stored |= {name: stored[there[0]] for name in tied if there and name not in stored}
        missing = [name for name in expected if name not in stored]
        if missing:
            raise UserError(
                f"{OPTION}: the weights of '{self.source}' lack {len(missing)} tensors that its config asks for, "
                f"{missing[0]!r} the first. Give a complete causal language model."
            )
        for parameter, name in stored.items():
            self._check_entry(name, tuple(expected[parameter].shape))
        return stored

    def _own_names(self, expected: Mapping[str, object]) -> dict[str, str | None]:
        """Stored name -> parameter name, None for what is computed; names that mean nothing are left out."""
        names: dict[str, str | None] = {}
        taken: dict[str, str] = {}
        for name in self.tensors:
            if COMPUTED.search(name):
                names[name] = None
                continue
            parameter = next((spelling for spelling in _spellings(name) if spelling in expected), None)
            if parameter is None:
                continue
            if parameter in taken:
                raise UserError(
                    f"{OPTION}: the weights of '{self.source}' hold {parameter!r} twice, as {taken[parameter]!r} and "
                    f"as {name!r}. Remove one of them."
                )
            names[name], taken[parameter] = parameter, name
        return names

    def _check_entry(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self.tensors[name]
        if entry.shape != shape:
            raise UserError(
                f"{OPTION}: tensor {name!r} of '{self.source}' has the shape {list(entry.shape)}, but its config asks "
                f"for {list(shape)}. Give a config.json that belongs to these weights."
            )
        if entry.dtype not in WEIGHT_DTYPES:
            allowed = ", ".join(_dtype_name(dtype) for dtype in WEIGHT_DTYPES)
            raise UserError(
                f"{OPTION}: tensor {name!r} of '{self.source}' is stored as {_dtype_name(entry.dtype)}; allowed are "
                f"{allowed}. Give the model before it was quantised."
            )

    def _check_copies(self, first: str, second: str) -> None:
        """transformers unties a head whose stored copy differs; then the config does not say what the model is."""
        one, other = self.tensors[first], self.tensors[second]
        same = (one.dtype, one.shape) == (other.dtype, other.shape) and _same_bytes(one, other)
        if not same:
            raise UserError(
                f"{OPTION}: the config of '{self.source}' ties {first!r} and {second!r}, but both are stored and "
                f"differ. Set tie_word_embeddings to false in config.json, or remove the one that is not used."
            )

    def _refuse(self, what: str, names: list[str]) -> None:
        if names:
            shown = ", ".join(f"{name!r}" for name in names[:3]) + (", …" if len(names) > 3 else "")
            raise UserError(
                f"{OPTION}: {len(names)} tensors of '{self.source}' {what}: {shown}. They would be lost; give a "
                f"config.json that belongs to these weights, or a causal language model without additions."
            )


def open_checkpoint(path: str) -> CheckpointFiles:
    """Read the headers of a checkpoint's weight files, and nothing else.

    Args:
        path: model folder, or hub id whose files are taken from the cache or downloaded. ``model.safetensors`` comes
            before ``model.safetensors.index.json`` where both are there, as in transformers.

    Raises:
        UserError: no safetensors file, or one that is damaged, or an index that does not fit its files.
    """
    config = _find(path, "config.json")
    if config is None:
        raise UserError(f"{OPTION}: '{path}' holds no config.json. Give a Hugging Face model folder or a hub id.")
    single, index = _find(path, SAFE_WEIGHTS_NAME), None
    if single is None:
        index = _find(path, SAFE_WEIGHTS_INDEX_NAME)
    if single is None and index is None:
        raise UserError(
            f"{OPTION}: the weights cannot be loaded from '{path}': it holds neither {SAFE_WEIGHTS_NAME} nor "
            f"{SAFE_WEIGHTS_INDEX_NAME}. Give a model in the safetensors format; others can run code when opened."
        )
    if single is not None:
        return CheckpointFiles(path, config, _text_part(read_header(single)))
    assert index is not None
    return CheckpointFiles(path, config, _text_part(_read_shards(path, index)))


def _text_part(tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    inside = {name: entry for name, entry in tensors.items() if _text_name(name) != name}
    outside = {name: entry for name, entry in tensors.items() if name.startswith("lm_head.")}
    return inside | outside if inside else tensors


def _text_name(name: str) -> str:
    for pattern, own in TEXT_NAMES.items():
        if re.match(pattern, name):
            return re.sub(pattern, own, name)
    return name


def _read_shards(path: str, index: Path) -> dict[str, TensorEntry]:
    weight_map = _weight_map(index)
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        file = _find(path, shard)
        if file is None:
            raise UserError(
                f"{OPTION}: the weights cannot be loaded from '{path}': {index.name} names {shard!r}, which is not "
                f"there. Copy or download the model again."
            )
        for name, entry in read_header(file).items():
            if name in tensors or weight_map.get(name, shard) != shard:
                raise UserError(
                    f"{OPTION}: the weights cannot be loaded from '{path}': tensor {name!r} is in {shard!r} and also "
                    f"in '{tensors[name].file.name if name in tensors else weight_map[name]}'. Copy the model again."
                )
            tensors[name] = entry
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise UserError(
            f"{OPTION}: the weights cannot be loaded from '{path}': {index.name} names tensor {lost[0]!r}, which "
            f"{weight_map[lost[0]]!r} does not hold. Copy or download the model again."
        )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    size = require_regular(index, OPTION)
    try:
        if size > HEADER_LIMIT:
            raise ValueError(f"{size} bytes; at most {HEADER_LIMIT} are read")
        content = json.loads(index.read_bytes().decode("utf-8"), object_pairs_hook=no_duplicates)
        weight_map = content["weight_map"] if isinstance(content, dict) and "weight_map" in content else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it has no weight_map with tensors")
        for name, shard in weight_map.items():
            # A path would reach outside the folder.
            if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
                raise ValueError(f"tensor {name!r} is mapped to {shard!r}, which is not the name of a safetensors file")
        return weight_map
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{OPTION}: the weights cannot be loaded: '{index}' is damaged ({first_line(error)}). "
            f"Copy or download the file again."
        ) from None


def _find(path: str, name: str) -> Path | None:
    """A file of a model folder or of the hub; None where it is not there."""
    try:
        found: Callable[..., str | None] = cached_file
        file = found(path, name, _raise_exceptions_for_missing_entries=False)
    except Exception as error:  # the hub's clients raise dozens of types: offline, gated, moved, rate-limited
        raise UserError(
            f"{OPTION}: {name!r} cannot be had from '{path}' ({type(error).__name__}: {first_line(error)}). "
            f"Give a Hugging Face model folder, or a hub id that can be reached."
        ) from error
    return None if file is None else Path(file)


def _spellings(name: str) -> tuple[str, ...]:
    """As it is, with one ``model.`` less, with one more; without the prefix of a text model in a larger one."""
    name = _text_name(name)
    less = (name.removeprefix("model."),) if name.startswith("model.") else ()
    return (name, *less, f"model.{name}")


def _tied_names(expected: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Groups of names that stand for one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in expected.items():
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.end - one.start
        while left:
            step = min(left, 1 << 24)
            if first.read(step) != second.read(step):
                return False
            left -= step
    return True


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
