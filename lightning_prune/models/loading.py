"""Models, configs and tokenizers from a folder, a hub id, or the word ``demo``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

from lightning_prune.models.checkpoint_files import open_checkpoint
from lightning_prune.models.families import family_of
from lightning_prune.models.modeling_pruned import classes_of, pruned_class
from lightning_prune.models.records import TEXT_PARTS
from lightning_prune.models.safetensors_header import OPTION as OPTION
from lightning_prune.models.safetensors_header import first_line
from lightning_prune.models.sources import CheckpointSource
from lightning_prune.support.errors import UserError
from lightning_prune.support.quiet import quiet_transformers as quiet_transformers
from lightning_prune.support.regular_files import exists, expanded, is_special, require_regular

CONFIG_LIMIT = 10_000_000  # bytes
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def resolve(pretrained: str) -> str:
    """The folder or hub id behind ``pretrained``: ``demo`` stands for the embedded model.

    Raises:
        UserError: a folder that is missing or has no ``config.json``.
    """
    if pretrained == "demo":
        from lightning_prune.demo import demo_model_path

        return str(demo_model_path())
    folder = expanded(pretrained, OPTION)
    config = folder / "config.json"
    if is_special(config):
        require_regular(config, OPTION)
    if exists(config) and config.is_file():
        if config.stat().st_size > CONFIG_LIMIT:
            raise UserError(f"{OPTION}: '{config}' has {config.stat().st_size} bytes; a config has a few thousand.")
        return str(folder)
    if exists(folder):
        raise UserError(
            f"{OPTION}: '{pretrained}' holds no config.json, so it is not a Hugging Face model folder. "
            f"Give a folder with config.json and *.safetensors, a hub id, or 'demo'."
        )
    # What is left can be a hub id: "organisation/name", or one of the few bare names.
    if folder.is_absolute() or pretrained.startswith(".") or len(folder.parts) not in (1, 2):
        raise UserError(
            f"{OPTION}: no folder at '{pretrained}'. Give a Hugging Face model folder, a hub id, or 'demo'."
        )
    return pretrained


def load_config(pretrained: str) -> PretrainedConfig:
    """The config of a supported model: dense, or pruned by this package in either layout.

    The headers of the weights are read too, so that nothing of a size is built that the config alone claims.

    Raises:
        UserError: nothing there, unreachable, unreadable, a family without a record, or another number of layers
            than the weights have.
    """
    config = config_alone(pretrained)
    open_checkpoint(resolve(pretrained)).check_layers(config.num_hidden_layers)
    return config


def config_alone(pretrained: str) -> PretrainedConfig:
    """As ``load_config``, and the weights need not be there.

    Raises:
        UserError: nothing there, unreachable, unreadable, or a family without a record.
    """
    with quiet_transformers(), _user_error(pretrained, "the config cannot be loaded"):
        config = AutoConfig.from_pretrained(resolve(pretrained), trust_remote_code=False)
    _refuse_additions(config, pretrained)
    config = _text_part(config)
    family_of(config)
    _check_sizes(config, pretrained)
    return config


def _text_part(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the text model, where a folder holds more than that and the rest can be left out."""
    if config.model_type not in TEXT_PARTS:
        return config
    text = config.text_config
    text.name_or_path, text.tie_word_embeddings = config.name_or_path, config.tie_word_embeddings
    if text.dtype is None:
        text.dtype = config.dtype
    return text  # type: ignore[no-any-return]


def check_model(pretrained: str) -> PreTrainedModel:
    """All that can be known of a model without reading a weight: config, generation config, names and shapes.

    Returns:
        The model on the meta device.

    Raises:
        UserError: as ``load_config``; or weights or a generation config that do not belong to it or are damaged.
    """
    model = meta_model(load_config(pretrained))
    open_checkpoint(resolve(pretrained)).check_against(model)
    generation_config(pretrained)  # it is copied to the pruned model in the end
    return model


def _check_sizes(config: PretrainedConfig, pretrained: str) -> None:
    """A size of 0 builds a model of nothing; per-layer sizes are held against the weights."""
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"):
        value = vars(config).get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"{OPTION}: the config of '{pretrained}' has {name} {value}; it must be a whole number of 1 or more."
            )


def _refuse_additions(config: PretrainedConfig, pretrained: str) -> None:
    """What would be read as something else than the weights alone say."""
    for key in ("quantization_config", "compression_config"):
        if getattr(config, key, None) is not None:
            raise UserError(
                f"{OPTION}: the config of '{pretrained}' has a {key}: its weights are quantised, and pruning needs "
                "them in 64, 32 or 16 bits floating point. Give the model before it was quantised."
            )
    if exists(expanded(pretrained, OPTION) / "adapter_config.json"):
        raise UserError(
            f"{OPTION}: '{pretrained}' holds an adapter (adapter_config.json) beside a model. Merge the adapter into "
            "the weights, or remove its files."
        )


def load_model(pretrained: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """A causal LM in eval mode: dense, stock or per-layer, without remote code.

    Weights are read from safetensors straight into ``dtype`` (None: the checkpoint's own), on the default
    device of the surrounding ``with torch.device(...)``, the CPU without one.

    Raises:
        UserError: as ``load_config``; or weights that are missing, damaged, or do not fit the config.
    """
    config = load_config(pretrained)
    path = resolve(pretrained)
    files = open_checkpoint(path)
    meta = meta_model(config)
    stored = files.check_against(meta)
    with quiet_transformers(), _user_error(pretrained, "the weights cannot be loaded"):
        if files.is_part:  # whose names transformers would restore in what is saved later
            state = CheckpointSource(files, stored).read(list(stored), dtype, torch.device("cpu"))
            kind = dtype or next(iter(state.values())).dtype
            return type(meta).from_pretrained(None, config=config, state_dict=state, dtype=kind)
        return _auto_class(config).from_pretrained(  # type: ignore[no-any-return]
            path, config=config, dtype="auto" if dtype is None else dtype, use_safetensors=True
        )


def meta_model(config: PretrainedConfig, device: torch.device | None = None) -> PreTrainedModel:
    """A model without storage: shapes and names to check before any weight is read. ``device``: meta by default.

    Raises:
        UserError: the config is inconsistent.
    """
    trouble = _user_error(config.name_or_path, "no model can be built from the config")
    # Buffers get their values when they are made; parameters get theirs from a checkpoint.
    with quiet_transformers(), trouble, no_init_weights(), device or torch.device("meta"):
        build = _auto_class(config) if config.is_heterogeneous else AutoModelForCausalLM.from_config
        net: PreTrainedModel = build(config)
    net.tie_weights()  # which transformers counts as a part of the initialisation
    return net


def generation_config(pretrained: str) -> GenerationConfig | None:
    """The generation config stored beside the model, or None where there is none."""
    path = resolve(pretrained)
    with quiet_transformers(), _user_error(pretrained, "the generation config cannot be loaded"):
        name = "generation_config.json"
        if cached_file(path, name, _raise_exceptions_for_missing_entries=False) is None:
            return None
        found = GenerationConfig.from_pretrained(path)
        found.get_generation_mode()  # compares values, so one of a wrong kind is found here and not in the first use
        return found  # type: ignore[no-any-return]


def load_tokenizer(pretrained: str) -> Any | None:
    """The tokenizer stored beside the model, or None where there is none.

    Raises:
        UserError: its files are there but cannot be read.
    """
    if not tokenizer_files(pretrained):
        return None
    with quiet_transformers(), _user_error(pretrained, "the tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(resolve(pretrained), trust_remote_code=False)


def tokenizer_files(pretrained: str) -> list[Path]:
    """Local paths of the tokenizer files that stand beside the model (hub files from the cache)."""
    path = resolve(pretrained)
    with quiet_transformers(), _user_error(pretrained, "the tokenizer files cannot be found"):
        found = [
            cached_file(
                path,
                name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            for name in TOKENIZER_FILES
        ]
    return [Path(file) for file in found if file is not None]


def _auto_class(config: PretrainedConfig) -> Any:
    if config.is_heterogeneous:
        return pruned_class(classes_of(config.model_type)["AutoModelForCausalLM"])
    return AutoModelForCausalLM


@contextmanager
def _user_error(pretrained: str, what: str) -> Iterator[None]:
    """Errors of transformers, safetensors, json and the hub client have no common base: all mean bad input here."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, AttributeError | TypeError):  # their words are about transformers' own code
            reason = "an entry of config.json has a value of a kind that transformers cannot use"
        raise UserError(
            f"{OPTION}: {what} from '{pretrained}' ({reason}). "
            f"Give a Hugging Face model folder, a hub id that can be reached, or 'demo'."
        ) from error
