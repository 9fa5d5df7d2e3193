"""A model that is loaded, as a folder that a checkpoint can be opened from."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from lightning_prune.support.errors import UserError, first_line
from lightning_prune.support.quiet import quiet_transformers


def unwrapped(model: Any) -> str | Path | PreTrainedModel:
    """``model`` where it is a path or a causal LM; of a compiled or data-parallel one, what is inside. Raises UserError
    for anything else, and for a model that cannot be written."""
    while not isinstance(model, PreTrainedModel) and isinstance(model, nn.Module) and not hasattr(model, "peft_config"):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if isinstance(model, str | Path):
        return model
    kind = type(model).__name__
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"model: found a {kind} with an adapter. Give model.merge_and_unload(), or the model without it."
        )
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model: found a {kind}; give a folder, a hub id or a causal language model of transformers.")
    if model.get_output_embeddings() is None:
        raise UserError(f"model: {kind} has no language model head. Load the model with AutoModelForCausalLM.")
    if any(parameter.is_meta for parameter in model.parameters()) and not hasattr(model, "hf_device_map"):
        raise UserError(f"model: this {kind} is on the meta device and has no weights. Load it with from_pretrained.")
    return model


def written(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> str:
    """Save a causal LM as it is, also with generation settings that ``save_pretrained`` refuses; gives the folder.
    Raises UserError where it cannot be saved."""
    own = model.generation_config
    try:
        with quiet_transformers():
            model.generation_config = GenerationConfig()
            model.save_pretrained(folder)
            if own is not None:
                own.to_json_file(folder / "generation_config.json", use_diff=True)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise UserError(f"model: this {type(model).__name__} cannot be saved ({first_line(error)}).") from error
    finally:
        model.generation_config = own
    return str(folder)
