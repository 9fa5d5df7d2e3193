"""Which architecture of the GGUF format holds a model, and what no architecture holds.

llama.cpp reads widths per layer in two of the architectures that compute what our families compute: ``deci``
(Llama's arithmetic, biases allowed) and ``openelm`` (norms on queries and keys, tied embeddings). Models whose layers
have the same widths go under the name of their own family.
"""

from dataclasses import dataclass
from typing import Any

from lightning_prune.support.errors import UserError

OWN = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
PER_LAYER = {"llama": "deci", "mistral": "deci", "qwen2": "deci", "qwen3": "openelm"}


@dataclass(frozen=True)
class Architecture:
    """One architecture of the format, as llama.cpp computes it.

    Attributes:
        name: ``general.architecture``.
        per_layer: head counts and MLP widths are arrays over layers.
        interleaved: rotary pairs are neighbours (2 i, 2 i + 1), not (i, i + d/2) as in transformers, so rows of queries
            and keys change places.
        fused: queries, keys and values are one matrix.
        frequency_factors: takes a divisor for every rotary frequency (Llama 3's scaling).
        biases: of the projections; what a family has beyond them is refused.
    """

    name: str
    per_layer: bool = False
    interleaved: bool = False
    fused: bool = False
    frequency_factors: bool = False
    biases: tuple[str, ...] = ()


LLAMA_BIASES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARCHITECTURES = {
    found.name: found
    for found in (
        Architecture("llama", interleaved=True, frequency_factors=True, biases=LLAMA_BIASES),
        Architecture("deci", per_layer=True, interleaved=True, frequency_factors=True, biases=LLAMA_BIASES),
        Architecture("qwen2", biases=("q_proj", "k_proj", "v_proj")),
        Architecture("qwen3"),
        Architecture("openelm", per_layer=True, fused=True),
    )
}


def architecture_of(config: Any, biases: set[str]) -> Architecture:
    """The architecture that holds a model with this config.

    Args:
        config: of a dense or pruned model.
        biases: names of the projections that have one, such as ``q_proj``.

    Raises:
        UserError: none does; the message says which property stands in the way.
    """
    family = config.model_type
    names = PER_LAYER if config.is_heterogeneous else OWN
    if family not in names:
        raise _refusal(config, f"family '{family}': exported are {', '.join(sorted(names))}")
    found = ARCHITECTURES[names[family]]
    if found.fused and not config.tie_word_embeddings:
        raise _refusal(
            config,
            f"embeddings that are not tied to the head, in family '{family}' with widths that differ by layer: "
            f"architecture '{found.name}' has no head of its own",
        )
    too_many = sorted(biases - set(found.biases))
    if too_many:
        raise _refusal(config, f"bias of {', '.join(too_many)}: architecture '{found.name}' has none there")
    if config.hidden_act not in ("silu", "swish"):
        raise _refusal(config, f"activation '{config.hidden_act}': architecture '{found.name}' computes silu")
    kind, parameters = rope_of(config)
    if kind not in ("default", "linear", "llama3", "yarn") or (kind == "llama3" and not found.frequency_factors):
        raise _refusal(config, f"rotary scaling '{kind}': architecture '{found.name}' does not compute it")
    odd = [key for key in ("partial_rotary_factor", "mscale", "mscale_all_dim") if parameters.get(key) not in (None, 1)]
    odd += ["truncate"] if not parameters.get("truncate", True) else []
    if odd:
        raise _refusal(config, f"rotary parameter {odd[0]} {parameters[odd[0]]}: architecture '{found.name}' has none")
    return found


def rope_of(config: Any) -> tuple[str, dict[str, Any]]:
    """(kind, parameters) of the rotary embedding."""
    parameters = dict(config.rope_parameters)
    return str(parameters.get("rope_type", "default")), parameters


def window_of(config: Any) -> int | None:
    """Tokens that attention reaches back in the layers with a sliding window; None where no layer has one."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or (types is not None and "sliding_attention" not in types):
        return None
    return int(window)


def _refusal(config: Any, what: str) -> UserError:
    instead = "Use --format stock" if config.is_heterogeneous else "It is a stock folder"
    return UserError(
        f"--format gguf cannot hold this model's {what}. "
        f"{instead}, which llama.cpp's own convert_hf_to_gguf.py may take."
    )
