"""A model folder or hub id, opened once: config, headers, tokenizer, fingerprint, and the ways to its weights."""

import copy
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from os.path import exists, isfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from lightning_prune.models.expert_files import packed
from lightning_prune.models.families import family_of
from lightning_prune.models.family import ExpertNames
from lightning_prune.models.modeling_pruned import classes_of, pruned_class
from lightning_prune.models.records import SAME_TEXT, TEXT_PARTS
from lightning_prune.models.side_files import has_vocabulary, side_files
from lightning_prune.models.sources import CheckpointSource
from lightning_prune.models.weights import (
    LAYER,
    OPTION,
    TensorEntry,
    fetch_config,
    find_file,
    loading,
    match_names,
    read_headers,
    renamed,
    same_values,
    text_name,
)
from lightning_prune.support.errors import UserError
from lightning_prune.support.regular_files import expanded, is_special, require_regular

CONFIG_LIMIT = 10_000_000  # bytes
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
HASHED_WHOLE = 64 * 2**20  # bytes; of larger files the fingerprint samples pieces
PIECES, PIECE = 64, 64 * 2**10
ENDS = ("lm_head.weight", "model.embed_tokens.weight")
QUANTISATION = ("quantization_config", "compression_config")
NOT_WEIGHTS = ("_name_or_path", "transformers_version")
# Keys of the text model that a model of several may say in its own config instead.
OUTER = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Dense, or pruned by this package in either layout. Properties are read when they are first used, and raise
    UserError where that fails.

    Attributes:
        pretrained: as the user gave it; ``path``: the folder or hub id that it names.
        raw: the content of ``config.json``.
        config: of the causal language model; of several models in one, the text model's. Not to be changed.
    """

    pretrained: str
    path: str
    raw: dict[str, Any]
    config: PretrainedConfig

    @classmethod
    def open(cls, pretrained: str, weights: bool = True) -> "Checkpoint":
        """Read the config of a folder, a hub id or ``demo`` and, with ``weights``, the headers of the weight files.

        Raises:
            UserError: nothing there, unreachable, unreadable, a family without a record, quantised, or another number
                of layers than the weights have.
        """
        path = resolve(pretrained)
        with loading(pretrained, "the config cannot be loaded"):
            file = fetch_config(path)
            if (size := file.stat().st_size) > CONFIG_LIMIT:
                raise UserError(
                    f"{OPTION}: '{file}' has {size:,} bytes; a config may have {CONFIG_LIMIT:,}. Give the model's own "
                    "config.json."
                )
            raw = json.loads(file.read_text("utf-8"))
            if not isinstance(raw, dict):
                raise ValueError("config.json is not a JSON object")
            config = _config_of(raw, path)
        if exists(expanded(pretrained, OPTION) / "adapter_config.json"):
            raise UserError(
                f"{OPTION}: '{pretrained}' holds an adapter (adapter_config.json) beside a model. Merge the adapter "
                "into the weights, or remove its files."
            )
        family_of(config)
        for name in SIZES:  # a size of 0 builds a model of nothing; per-layer sizes are compared with the weights
            value = vars(config).get(name, 1)
            if not isinstance(value, int) or value < 1:
                raise UserError(
                    f"{OPTION}: the config of '{pretrained}' has {name} {value}; it must be a whole number of 1 or "
                    "more."
                )
        opened = cls(pretrained, path, raw, config)
        if weights:
            _ = opened.tensors
        return opened

    @property
    def limits(self) -> tuple[int, int | None]:
        """Rows of the embedding, and the longest sequence that the model was made for; None for no limit."""
        return self.config.vocab_size, getattr(self.config, "max_position_embeddings", None)

    @property
    def weight_files(self) -> list[Path]:
        """The checkpoint's weight files, sorted."""
        return self._headers[1]

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """The stored tensors by name."""
        return self._headers[0]

    @property
    def side_tensors(self) -> set[str]:
        """Names of the stored tensors beside the text model, if it is one of several: what the whole has more."""
        several = self.raw["model_type"] in TEXT_PARTS
        return {name for name in self._headers[2] if several and text_name(name) == name}

    def notes(self, whole: bool = False) -> list[str]:
        """A sentence on each thing in the folder that a checkpoint made from it will not hold: one of the text model,
        or of the ``whole``."""
        notes = [
            f"'{self.pretrained}': the config has a {key}, but its weights are not quantised; it is left out."
            for key in QUANTISATION
            if any(part.get(key) is not None for part in (self.raw, text_part(self.raw)))
        ]
        kept = self.side_tensors if whole else set()
        if left_out := Counter(part for name, part in self._headers[2].items() if name not in kept):
            parts = ", ".join(f"{part} ({count})" for part, count in left_out.items())
            notes.append(f"'{self.pretrained}': tensors beside the language model are left out: {parts}.")
        return notes

    @cached_property
    def _headers(self) -> tuple[dict[str, TensorEntry], list[Path], dict[str, str]]:
        tensors, files, left_out = read_headers(self.path, self.config.num_hidden_layers)
        layers, claimed = {match[1] for name in tensors if (match := LAYER.search(name))}, self.config.num_hidden_layers
        if claimed != len(layers):  # noticed before a model of that many layers is built
            raise UserError(
                f"{OPTION}: the config of '{self.path}' says num_hidden_layers {claimed}, but its weights have "
                f"{len(layers)} layers. Give a config.json that belongs to these weights."
            )
        says = [part.get("tie_word_embeddings") for part in (self.raw, text_part(self.raw))]
        if self.raw["model_type"] in TEXT_PARTS and says == [None, None]:
            ends = {name: own for own in tensors if (name := text_name(own)) in ENDS}
            head, embedding = (ends.get(name) for name in ENDS)
            self.config.tie_word_embeddings = not head or not embedding or same_values(tensors, head, embedding)
        family = family_of(self.config)
        tensors = {renamed(name, family.renamed): entry for name, entry in tensors.items()}
        return (tensors if family.experts is None else packed(tensors, family.experts)), files, left_out

    @property
    def expert_names(self) -> ExpertNames | None:
        """Layout of experts in the files: as the family's published ones, or in three-dimensional parameters."""
        family = family_of(self.config)
        names = family.experts
        apart = family.per_layer(self.config) or any(len(entry.places) > 1 for entry in self.tensors.values())
        return names if names is None or apart else replace(names, stored=None)

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The dtype most of its numbers are stored in."""
        count: Counter[torch.dtype] = Counter()
        for entry in self.tensors.values():
            count[entry.dtype] += entry.bytes
        return count.most_common(1)[0][0]

    @cached_property
    def meta(self) -> PreTrainedModel:
        """The model on the meta device. Not to be changed."""
        _ = self.tensors  # nothing of a size is built that the config alone claims
        return meta_model(self.config)

    @cached_property
    def stored_names(self) -> dict[str, str]:
        """Every parameter of the model → the name its values are stored under, see ``weights.match_names``."""
        return match_names(self.path, self.tensors, self.meta)

    def check(self, whole: bool = False) -> None:
        """Raise UserError for all that can be refused without reading a weight (names, shapes, generation config), and
        warn of what is left out, see ``notes``."""
        _ = self.stored_names, self.generation_config
        for note in self.notes(whole):
            rank_zero_warn(note)

    def skeleton(self) -> PreTrainedModel:
        """The model in eval mode with its parameters on the meta device, see the function ``skeleton``."""
        _ = self.stored_names
        return skeleton(copy.deepcopy(self.config))

    def source(self) -> CheckpointSource:
        """Open the checkpoint's weights, by the names they have in the model."""
        return CheckpointSource({name: self.tensors[own] for name, own in self.stored_names.items()})

    def load(self, dtype: torch.dtype | None) -> PreTrainedModel:
        """The whole causal LM in eval mode, without remote code, in ``dtype`` (None: as the config says), on the
        default device of the surrounding ``with torch.device(...)``."""
        stored, config = self.stored_names, copy.deepcopy(self.config)
        with loading(self.pretrained, "the weights cannot be loaded"):
            if any(text_name(name) != name for name in self.tensors):
                # Only the text model's; by their names transformers would take what is saved later for the larger one.
                state = self.source().read(list(stored), dtype, torch.device("cpu"))
                stored_kind = dtype or next(iter(state.values())).dtype
                return type(self.meta).from_pretrained(None, config=config, state_dict=state, dtype=stored_kind)
            kind = dtype or "auto"
            return type(self.meta).from_pretrained(self.path, config=config, dtype=kind, use_safetensors=True)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the config and the weights, 64 hexadecimal digits, cheap enough to take in every run.

        Files above 64 MiB give their size, their header (names, shapes, dtypes) and 64 evenly spaced pieces of 64 KiB.
        So a fine-tuned model differs, and the same model under another name or path does not.
        """
        facts = {key: value for key, value in self.raw.items() if key not in NOT_WEIGHTS}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for path in self.weight_files:
            size = path.stat().st_size
            digest.update(f"\n{size}\n".encode())
            with path.open("rb") as file:
                if size <= HASHED_WHOLE:
                    digest.update(file.read())
                    continue
                length = file.read(8)
                digest.update(length + file.read(int.from_bytes(length, "little")))
                for piece in range(PIECES):
                    file.seek((size - PIECE) * piece // (PIECES - 1))
                    digest.update(file.read(PIECE))
        return digest.hexdigest()

    @cached_property
    def generation_config(self) -> GenerationConfig | None:
        """The generation config beside the weights, None where there is none."""
        with loading(self.pretrained, "the generation config cannot be loaded"):
            if find_file(self.path, "generation_config.json") is None:
                return None
            generation = GenerationConfig.from_pretrained(self.path)
            generation.get_generation_mode()  # compares values: one of a wrong kind raises here, not when it is used
            return generation  # type: ignore[no-any-return]

    @cached_property
    def side_files(self) -> dict[str, Path]:
        """The files of tokenizer, templates and processor beside the weights, see ``side_files.side_files``."""
        return side_files(self.path)

    @cached_property
    def tokenizer(self) -> Any | None:
        """The tokenizer beside the weights, None where there is none."""
        if not has_vocabulary(self.side_files):
            return None
        with loading(self.pretrained, "the tokenizer cannot be loaded"):
            return AutoTokenizer.from_pretrained(self.path, config=self.config, trust_remote_code=False)

    def __getstate__(self) -> dict[str, Any]:
        """The state without cached properties, some of which cannot be sent to another process."""
        return {name: vars(self)[name] for name in self.__dataclass_fields__}


def resolve(pretrained: str) -> str:
    """The folder or hub id that ``pretrained`` names; ``demo`` is the embedded model. Raises UserError for a folder
    that is missing or has no ``config.json``."""
    if pretrained == "demo":
        from lightning_prune.demo import demo_model_path

        return str(demo_model_path())
    if "\n" in pretrained:
        raise UserError(f"{OPTION}: not a path or hub id, but text that begins with {pretrained[:40]!r}.")
    folder = expanded(pretrained, OPTION)
    config = folder / "config.json"
    if is_special(config):
        require_regular(config, OPTION)
    if isfile(config):
        return str(folder)
    if exists(folder):
        inside = (
            f" A run's checkpoint is in '{pretrained}/pruned'." if isfile(folder / "pruned" / "config.json") else ""
        )
        raise UserError(
            f"{OPTION}: '{pretrained}' holds no config.json, so it is not a Hugging Face model folder.{inside} "
            f"Give a folder with config.json and *.safetensors, a hub id, or 'demo'."
        )
    # A hub id is "organisation/name", or one of the few bare names.
    if folder.is_absolute() or pretrained.startswith(".") or len(folder.parts) not in (1, 2):
        raise UserError(
            f"{OPTION}: no folder at '{pretrained}'. Give a Hugging Face model folder, a hub id, or 'demo'."
        )
    return pretrained


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model on the meta device: shapes and names, no storage; buffers that files hold (the correction biases of
    routers) are parameters. Raises UserError for an inconsistent config."""
    trouble = loading(config.name_or_path, "no model can be built from the config")
    with trouble, no_init_weights(), torch.device("meta"):
        build = AutoModelForCausalLM.from_config
        if family_of(config).per_layer(config):
            build = pruned_class(classes_of(config.model_type)["AutoModelForCausalLM"])
        net: PreTrainedModel = build(config)
    net.tie_weights()  # which transformers counts as a part of the initialisation
    for module in net.modules():
        for name in sorted(module._buffers.keys() - module._non_persistent_buffers_set):
            module.register_parameter(name, nn.Parameter(module._buffers.pop(name), requires_grad=False))
            net._keep_in_fp32_modules_strict = {*(net._keep_in_fp32_modules_strict or ()), name}
    return net


def kept_in_fp32(net: PreTrainedModel, dtype: torch.dtype | None) -> set[str]:
    """The parameters of a ``meta_model`` that transformers keeps in fp32 where the others are in ``dtype``."""
    patterns = {*(net._keep_in_fp32_modules_strict or ())} if dtype in (torch.float16, torch.bfloat16) else set()
    if dtype is torch.float16:
        patterns |= {*(net._keep_in_fp32_modules or ())}
    return {name for name, _ in net.named_parameters() if any(re.search(pattern, name) for pattern in patterns)}


def skeleton(config: Any) -> PreTrainedModel:
    """The model of ``config`` in eval mode: parameters on the meta device, buffers (rotary tables) real and fp32."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # half precisions set another one, which rotary tables must not take
    try:
        net = meta_model(config)
        with torch.device("cpu"), torch.no_grad():
            owners = [net.base_model]  # it may fill buffers of its layers
            for module in net.modules():
                names = [name for name, buffer in module._buffers.items() if buffer is not None]
                for name in names:  # NaN, so that the family check sees one which transformers forgets
                    module._buffers[name] = torch.full_like(module.get_buffer(name), torch.nan, device="cpu")
                owners += [module] if names else []
            for module in owners:
                net._init_weights(module)  # as from_pretrained does for what no checkpoint holds
    finally:
        torch.set_default_dtype(default)
    return net.eval().requires_grad_(False)


def _config_of(raw: dict[str, Any], path: str) -> PretrainedConfig:
    """The config that ``AutoConfig.from_pretrained`` would make of ``raw``; of several models the text model's."""
    values = PretrainedConfig._decode_special_floats(copy.deepcopy(raw))  # infinite ones are written as a dictionary
    for part in (values, text_part(values)):
        for key in QUANTISATION:  # the headers say whether weights are quantised
            part.pop(key, None)
        if part.get("tie_word_embeddings", True) is None:
            del part["tie_word_embeddings"]
    model_type = values.get("model_type")
    if model_type == "mistral" and "layer_types" in values:
        model_type = values["model_type"] = "ministral"
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        family_of(SimpleNamespace(model_type=model_type))  # raises, with the families there are
    config: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(values, name_or_path=path)
    if kinds := values.get("kept_layer_types"):
        config.layer_types = kinds
    if getattr(config, "block_auto_adjust_ff_dim", False):
        # The MLP of an LFM2 is two thirds as wide as its config says, scaled, rounded up.
        scale, step = config.block_ffn_dim_multiplier, config.block_multiple_of
        width = int((1 if scale is None else scale) * int(2 * config.intermediate_size / 3))
        config.intermediate_size, config.block_auto_adjust_ff_dim = step * -(-width // step), False
    return text_config(config, raw) if model_type in TEXT_PARTS else config


def text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """The text model's config within that of several models, as it is written; empty where there is none."""
    part = raw.get("text_config")
    return part if isinstance(part, dict) and raw.get("model_type") in TEXT_PARTS else {}


def text_config(whole: PretrainedConfig, raw: dict[str, Any]) -> PretrainedConfig:
    """The text model's config of ``whole``, which is written as ``raw``.

    Of ``SAME_TEXT`` it is that of the family. Their rotary positions have three parts (time, height, width), all of
    which are the token's place where there is text alone.
    """
    text: PretrainedConfig = whole.text_config
    text.name_or_path = whole.name_or_path
    for key in OUTER:  # as they are written: of those that are not, transformers' defaults for both may disagree
        if raw.get(key) is not None and text_part(raw).get(key) is None:
            setattr(text, key, raw[key])
    if text.dtype is None:
        text.dtype = whole.dtype
    if text.model_type not in SAME_TEXT:
        return text
    parts = ("type", "mrope_section", "mrope_interleaved")  # the first says "mrope" where an older version wrote it
    rotary = {key: value for key, value in text.rope_parameters.items() if key not in parts}
    values = text.to_dict() | {"rope_parameters": rotary, "model_type": SAME_TEXT[text.model_type]}
    return CONFIG_MAPPING[values["model_type"]].from_dict(values, name_or_path=text.name_or_path)  # type: ignore[no-any-return]
