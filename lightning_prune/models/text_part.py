"""The text model's config within that of a model of several."""

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from lightning_prune.models.records import SAME_TEXT, TEXT_PARTS

# Keys of the text model that a model of several may say in its own config instead.
OUTER = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """The text model's config within that of several models, as it is written; empty where there is none."""
    part = raw.get("text_config")
    return part if isinstance(part, dict) and raw.get("model_type") in TEXT_PARTS else {}


def says_tied(raw: dict[str, Any]) -> bool:
    """Whether a config says anywhere if the head is the embedding."""
    return any(part.get("tie_word_embeddings") is not None for part in (raw, text_part(raw)))


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
