"""A pruned text model put back into the model of several that it was taken from: tower and projector as they were."""

import copy
from collections.abc import Callable
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lightning_prune.models.checkpoint import NOT_WEIGHTS, QUANTISATION, Checkpoint
from lightning_prune.models.families import family_of
from lightning_prune.models.records import TEXT_PARTS
from lightning_prune.models.weights import text_name

HEAD = "lm_head.weight"
WHOLE_NOTE = (
    "This folder holds the whole model, of which the text model was pruned: load it with `AutoModelForImageTextToText`."
)


def why_text_alone(dense: Checkpoint, config: Any) -> str:
    """Why a text model with ``config`` cannot be put back into the folder it is from; empty where it can."""
    if dense.raw["model_type"] not in TEXT_PARTS:
        return f"'{dense.pretrained}' holds a text model and nothing else"
    if family_of(config).per_layer(config):
        return (
            "its layers differ in width, which the config of the whole model cannot say; --model.allocation uniform "
            "keeps them alike"
        )
    return ""


def whole_config(dense: Checkpoint, config: Any) -> dict[str, Any]:
    """The content of the whole model's ``config.json``, with ``config`` for its text model."""
    text = {key: value for key, value in config.to_dict().items() if key not in (*NOT_WEIGHTS, "architectures")}
    raw = {key: copy.deepcopy(value) for key, value in dense.raw.items() if key not in (*QUANTISATION, "torch_dtype")}
    return raw | {"text_config": text, "dtype": text["dtype"], "tie_word_embeddings": config.tie_word_embeddings}


def whole_names(dense: Checkpoint) -> Callable[[str], str]:
    """The name in the whole model's files of a parameter of the text model, as the dense folder has them."""
    norm = f"{family_of(dense.config).final_norm}.weight"
    own, head = norm.partition(".")[0], dense.stored_names.get(HEAD, HEAD)
    inner = dense.stored_names[norm].removesuffix(norm.removeprefix(f"{own}."))
    return lambda name: head if name == HEAD else inner + name.removeprefix(f"{own}.")


def tensors_beside(dense: Checkpoint) -> dict[str, Tensor]:
    """The tensors of the dense folder that are no part of its text model, views of its files."""
    found: dict[str, Tensor] = {}
    for path in dense.weight_files:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name not in dense.tensors]  # noqa: SIM118 (no mapping)
            found |= {name: file.get_tensor(name) for name in names if text_name(name) == name}
    return found
