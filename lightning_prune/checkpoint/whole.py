"""A pruned text model put back into the model of several that it was taken from: tower and projector as they were."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING

from lightning_prune.models.checkpoint import NOT_WEIGHTS, QUANTISATION, Checkpoint
from lightning_prune.models.families import family_of
from lightning_prune.models.records import SAME_TEXT, TEXT_PARTS

HEAD = "lm_head.weight"
LEFT_OUT = (*QUANTISATION, "torch_dtype")
WHOLE_NOTE = (
    "This folder holds the whole model, of which the text model was pruned: load it with `AutoModelForImageTextToText`."
)


def why_text_alone(dense: Checkpoint, config: Any, removed: Sequence[int]) -> str:
    """Why a text model with ``config``, without the layers ``removed``, cannot be put back into the folder it is from;
    empty where it can."""
    if dense.raw["model_type"] not in TEXT_PARTS:
        return f"'{dense.pretrained}' holds a text model and nothing else"
    if family_of(config).per_layer(config):
        return (
            "its layers differ in width, which the config of the whole model cannot say; --model.allocation uniform "
            "keeps them alike"
        )
    deep = len(getattr(_config(dense).vision_config, "deepstack_visual_indexes", ()))
    if any(layer < deep for layer in removed):
        return (
            f"layers {sorted(removed)} are removed, and the tower adds features of its own after each of the first "
            f"{deep}; remove channels or groups there, or only later layers"
        )
    return ""


def whole_config(dense: Checkpoint, config: Any) -> dict[str, Any]:
    """The content of the whole model's ``config.json``, with ``config`` for its text model."""
    text = {key: value for key, value in config.to_dict().items() if key not in (*NOT_WEIGHTS, "architectures")}
    dense_text = _config(dense).text_config.to_dict()
    if dense_text["model_type"] in SAME_TEXT:  # with what the family that it was opened as does not have
        own = {key: dense_text[key] for key in ("model_type", "rope_parameters")}
        text = {key: value for key, value in text.items() if key in dense_text} | own
    # Older folders of Qwen2-VL have the keys of the text model among their own.
    moved = set() if "text_config" in dense.raw else {*text, "rope_theta", "rope_scaling"} - {"model_type"}
    raw = {key: copy.deepcopy(value) for key, value in dense.raw.items() if key not in {*LEFT_OUT, *moved}}
    return raw | {"text_config": text, "dtype": text["dtype"], "tie_word_embeddings": config.tie_word_embeddings}


def whole_names(dense: Checkpoint) -> Callable[[str], str]:
    """The name in the whole model's files of a parameter of the text model, as the dense folder has them."""
    norm = f"{family_of(dense.config).final_norm}.weight"
    own, head = norm.partition(".")[0], dense.stored_names.get(HEAD, HEAD)
    inner = dense.stored_names[norm].removesuffix(norm.removeprefix(f"{own}."))
    return lambda name: head if name == HEAD else inner + name.removeprefix(f"{own}.")


def tensors_beside(dense: Checkpoint) -> dict[str, Tensor]:
    """The tensors of the dense folder that do not belong to its text model, views of its files."""
    tensors: dict[str, Tensor] = {}
    beside = dense.side_tensors
    for path in dense.weight_files:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name in beside]  # noqa: SIM118 (no mapping)
            tensors |= {name: file.get_tensor(name) for name in names}
    return tensors


def bytes_beside(dense: Checkpoint) -> int:
    """Bytes of ``tensors_beside``."""
    return sum(tensor.nbytes for tensor in tensors_beside(dense).values())


def _config(dense: Checkpoint) -> Any:
    """The config of the whole model, of which the text model is a part."""
    return CONFIG_MAPPING[dense.raw["model_type"]].from_dict(copy.deepcopy(dense.raw))
