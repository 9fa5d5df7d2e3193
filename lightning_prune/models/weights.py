"""The tensors of a checkpoint's weight files, from their headers alone, compared with what its config requires."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os.path import exists
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from lightning_prune.support.errors import UserError, first_line
from lightning_prune.support.quiet import quiet_transformers

OPTION = "--model.pretrained"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by stored name
INDEX_LIMIT = 100_000_000  # bytes
# Parts that published checkpoints hold beside the causal language model: rotary tables, which are computed from the
# config, causal masks, heads for other purposes, and models for images and sound.
SIDE_PARTS = re.compile(
    r"(?:^|\.)(rotary_emb)\.(?:original_)?(?:inv_freq|cos_cached|sin_cached)$|(?:^|\.)(attention\.(?:masked_)?bias)$"
    r"|^(?:model\.|base_model\.)*(mtp\w*|v_head|value_head|medusa_head\w*|vision_tower|vision_model|visual"
    r"|audio_tower|multi_modal_projector|mm_projector)\."
)
# Tensors that say how others are to be read.
QUANTISED = re.compile(r"\.(weight_(scale\w*|packed|shape|zero_point)|qweight|qzeros|scales|absmax|g_idx)$")
# The text model's tensors within a checkpoint of several models, and what they are called by themselves.
TEXT_NAMES = {
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}
LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor, or several that are consecutive rows of one: ``places``, file and name of each in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    places: tuple[tuple[Path, str], ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@contextmanager
def loading(pretrained: str, what: str) -> Iterator[None]:
    """Within the block libraries are quiet, and all their errors become UserErrors, because they mean bad input
    here."""
    try:
        with quiet_transformers():
            yield
    except (MemoryError, torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, AttributeError | TypeError):  # their messages are about transformers' own code
            reason = "an entry of config.json has a value of a kind that transformers cannot use"
        nowhere = "" if exists(pretrained) else "no folder here, and "
        raise UserError(
            f"{OPTION}: {nowhere}{what} from '{pretrained}' ({reason}). "
            f"Give a Hugging Face model folder, a hub id that can be reached, or 'demo'."
        ) from error


def find_file(path: str, name: str) -> Path | None:
    """A regular file of a model folder or of the hub (from the cache, or downloaded); None where there is none. Raises
    UserError where the hub cannot be reached, or refuses."""
    with loading(path, f"{name!r} could not be loaded"):
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file)


def fetch_config(path: str) -> Path:
    """``config.json`` of a model folder or of the hub. Where the hub cannot be reached, a name without an organisation
    is refused at once: it is rather a mistyped folder, and the hub's client would try for half a minute."""
    with suppress(HfHubHTTPError, HFValidationError):  # it can be reached: what is wrong is said below
        if "/" not in path and not exists(path) and try_to_load_from_cache(path, "config.json") is None:
            get_hf_file_metadata(hf_hub_url(path, "config.json"))
    return Path(cached_file(path, "config.json"))


def read_headers(path: str, num_layers: int) -> tuple[dict[str, TensorEntry], list[Path], dict[str, str]]:
    """The tensors of a folder or hub id by the names they are stored under (of several models in one, the text
    model's), all weight files in order, and what is left out: tensor → the side part that it belongs to. Layers
    beyond the ``num_layers`` of the config (multi-token prediction) are side parts too.

    Raises:
        UserError: no safetensors file, one that is damaged or quantised, or an index that does not fit its files.
    """
    weight_map, names = {}, [SAFE_WEIGHTS_NAME]
    if find_file(path, SAFE_WEIGHTS_NAME) is None:  # which comes first where both are there, as in transformers
        index = find_file(path, SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            raise UserError(
                f"{OPTION}: the weights cannot be loaded from '{path}': it holds neither {SAFE_WEIGHTS_NAME} nor "
                f"{SAFE_WEIGHTS_INDEX_NAME}. Give a model in the safetensors format; others can run code when opened."
            )
        weight_map = _weight_map(index)
        names = sorted(set(weight_map.values()))
    stored = _stored(path, names, weight_map)
    inside = {name for name in stored if text_name(name) != name}
    tensors: dict[str, TensorEntry] = {}
    left_out: dict[str, str] = {}
    for name, (file, dtype, shape) in stored.items():
        part = _side_part(name, num_layers)
        if inside and name not in inside and not name.startswith("lm_head."):
            part = part or name.removeprefix("model.").partition(".")[0]
        if part is not None:
            left_out[name] = part
        elif dtype not in DTYPES or QUANTISED.search(name):
            raise UserError(
                f"{OPTION}: the weights are quantised: tensor {name!r} of '{path}' is stored as {dtype}; supported "
                f"are unquantised weights in {', '.join(DTYPES)}. Give the model before it was quantised."
            )
        else:
            tensors[name] = TensorEntry(DTYPES[dtype], shape, ((file, name),))
    return tensors, sorted({file for file, _, _ in stored.values()}), left_out


def _side_part(name: str, num_layers: int) -> str | None:
    """The known part beside the causal language model that a tensor belongs to; None for all others."""
    own = text_name(name)
    if match := SIDE_PARTS.search(own):
        return match[match.lastindex or 0]
    layer = re.match(r"(?:model\.)*(layers\.(\d+))\.", own)
    return layer[1] if layer and int(layer[2]) >= num_layers else None


def text_name(name: str) -> str:
    """The name in the text model alone of one of its tensors within a larger model; others keep their name."""
    for pattern, own in TEXT_NAMES.items():
        name = re.sub(pattern, own, name)
    return name


def renamed(name: str, parts: Mapping[str, str]) -> str:
    """``name`` with parts of it replaced, one after another."""
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def match_names(source: str, tensors: Mapping[str, TensorEntry], model: nn.Module) -> dict[str, str]:
    """Every parameter of a model on the meta device (tied ones under all their names) → the name its values are stored
    under: ``model.`` may be left out or doubled, equal copies and a tied head stored as one are allowed.

    Raises:
        UserError: tensors are missing, left over, stored twice or of another shape, or a tied head's copy differs
            from the embedding.
    """
    expected = dict(model.named_parameters(remove_duplicate=False))
    stored = _own_names(source, tensors, expected)
    groups: dict[int, list[str]] = {}
    for name, parameter in expected.items():
        groups.setdefault(id(parameter), []).append(name)
    for tied in groups.values():
        there = [stored[name] for name in tied if name in stored]
        # transformers unties a head whose stored copy differs; then the config does not say what the model is.
        if len(there) > 1 and not same_values(tensors, *there[:2]):
            raise UserError(
                f"{OPTION}: the config of '{source}' ties {there[0]!r} and {there[1]!r}, but both are stored and "
                "differ. Set tie_word_embeddings to false in config.json, or remove the one that is not used."
            )
        stored |= {name: there[0] for name in tied if there and name not in stored}
    if missing := [name for name in expected if name not in stored]:
        raise UserError(
            f"{OPTION}: the weights of '{source}' lack {len(missing)} tensors that its config requires, "
            f"{missing[0]!r} the first. Give a complete causal language model."
        )
    for own, name in stored.items():
        shape, needed = tensors[name].shape, tuple(expected[own].shape)
        if shape != needed:
            raise UserError(
                f"{OPTION}: tensor {name!r} of '{source}' has the shape {list(shape)}, but its config requires "
                f"{list(needed)}. Give a config.json that belongs to these weights."
            )
    return stored


def _own_names(source: str, tensors: Mapping[str, TensorEntry], expected: Mapping[str, object]) -> dict[str, str]:
    """Map every parameter name to the name it is stored under."""
    stored: dict[str, str] = {}
    unknown = []
    for name in tensors:
        own = text_name(name)
        spellings = (own, own.removeprefix("model."), f"model.{own}")
        parameter = next((spelling for spelling in spellings if spelling in expected), None)
        if parameter is None:
            unknown.append(name)
        elif parameter in stored and not same_values(tensors, stored[parameter], name):
            raise UserError(
                f"{OPTION}: the weights of '{source}' hold {parameter!r} twice, as {stored[parameter]!r} and as "
                f"{name!r}. Remove one of them."
            )
        else:
            stored[parameter] = name
    if unknown:
        shown = ", ".join(f"{name!r}" for name in sorted(unknown)[:3]) + (", …" if len(unknown) > 3 else "")
        raise UserError(
            f"{OPTION}: {len(unknown)} tensors of '{source}' are not part of the model that its config describes: "
            f"{shown}. They would be lost; give a config.json that belongs to these weights, or a causal language "
            f"model without additions."
        )
    return stored


def same_values(tensors: Mapping[str, TensorEntry], first: str, second: str) -> bool:
    """Whether two stored tensors are equal, bit for bit."""
    if (tensors[first].dtype, tensors[first].shape) != (tensors[second].dtype, tensors[second].shape):
        return False
    values = []
    for name in (first, second):
        ((path, stored),) = tensors[name].places
        with safe_open(path, framework="pt") as file:
            values.append(file.get_tensor(stored))  # a view of the file: takes no memory of its own
    return torch.equal(*(value.view(torch.uint8) for value in values))


@contextmanager
def _intact(file: Path) -> Iterator[None]:
    """Raise UserError for an error within the block, which means that ``file`` is damaged."""
    try:
        yield
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{OPTION}: the weights cannot be loaded: '{file}' is damaged ({first_line(error)}). "
            f"Copy or download the file again."
        ) from None


def _stored(path: str, files: list[str], weight_map: dict[str, str]) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """File, dtype and shape of the tensors of ``files``; raises UserError where ``weight_map`` names other files."""
    tensors: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    trouble = f"{OPTION}: the weights cannot be loaded from '{path}':"
    for shard in files:
        if (file := find_file(path, shard)) is None:
            raise UserError(
                f"{trouble} {SAFE_WEIGHTS_INDEX_NAME} names {shard!r}, which does not exist. Copy or download the "
                "model again."
            )
        with _intact(file), safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            entries = {name: (file, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        for name, entry in entries.items():
            if name in tensors or weight_map.get(name, shard) != shard:
                other = tensors[name][0].name if name in tensors else weight_map[name]
                raise UserError(
                    f"{trouble} tensor {name!r} is in {shard!r} and also in '{other}'. Copy the model again."
                )
            tensors[name] = entry
    if lost := sorted(weight_map.keys() - tensors.keys()):
        raise UserError(
            f"{trouble} {SAFE_WEIGHTS_INDEX_NAME} names tensor {lost[0]!r}, which {weight_map[lost[0]]!r} does not "
            "hold. Copy or download the model again."
        )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    with _intact(index):
        if (size := index.stat().st_size) > INDEX_LIMIT:
            raise ValueError(f"{size} bytes; at most {INDEX_LIMIT} are read")
        content = json.loads(index.read_text("utf-8"))
        weight_map: Any = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it has no weight_map with tensors")
        for name, shard in weight_map.items():
            # A path would reach outside the folder.
            if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
                raise ValueError(f"tensor {name!r} is mapped to {shard!r}, which is not the name of a safetensors file")
        return weight_map
