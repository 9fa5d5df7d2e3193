"""Which architecture of the GGUF format holds a model. llama.cpp reads widths per layer in two that compute what our
families compute: ``deci`` (Llama's arithmetic, biases allowed) and ``openelm`` (norms on queries and keys, tied
embeddings)."""

from dataclasses import dataclass
from typing import Any

from lightning_prune.checkpoint.cut import layout_of
from lightning_prune.support.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """One architecture of the format, as llama.cpp computes it."""

    name: str  # ``general.architecture``
    per_layer: bool = False  # head counts and MLP widths are arrays over layers
    # Rotary pairs are neighbours (2 i, 2 i + 1), not (i, i + d/2) as in transformers, so rows of queries and keys
    # change places; and there is a divisor for every rotary frequency (Llama 3's scaling).
    like_llama: bool = False
    fused: bool = False  # queries, keys and values are one matrix, and the head is the embedding
    biases: tuple[str, ...] = ()  # of the projections; what a family has beyond them is refused


LLAMA_BIASES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA = Architecture("llama", like_llama=True, biases=LLAMA_BIASES)
DECI = Architecture("deci", per_layer=True, like_llama=True, biases=LLAMA_BIASES)
QWEN2 = Architecture("qwen2", biases=("q_proj", "k_proj", "v_proj"))
OPENELM = Architecture("openelm", per_layer=True, fused=True)
# Family → the architecture of a model with one width, and of one with widths per layer.
ARCHITECTURES = {
    "llama": (LLAMA, DECI),
    "mistral": (LLAMA, DECI),
    "qwen2": (QWEN2, DECI),
    "qwen3": (Architecture("qwen3"), OPENELM),
}


def architecture_of(config: Any, biases: set[str]) -> Architecture:
    """The architecture that holds a model with this config, dense or pruned; ``biases`` are names of the projections
    that have one, such as ``q_proj``.

    Raises:
        UserError: none does; the message says which property is in the way.
    """
    instead = "Use --format stock" if layout_of(config) == "per-layer" else "It is a stock folder"

    def refuse(what: str) -> UserError:
        return UserError(
            f"--format gguf cannot hold this model's {what}. "
            f"{instead}, which llama.cpp's own convert_hf_to_gguf.py may take."
        )

    if config.model_type not in ARCHITECTURES:
        raise refuse(f"family '{config.model_type}': exported are {', '.join(sorted(ARCHITECTURES))}")
    architecture = ARCHITECTURES[config.model_type][config.is_heterogeneous]
    if architecture.fused and not config.tie_word_embeddings:
        raise refuse(
            f"embeddings that are not tied to the head, in family '{config.model_type}' with widths that differ by "
            f"layer: architecture '{architecture.name}' has no head of its own"
        )
    if too_many := sorted(biases - set(architecture.biases)):
        raise refuse(f"bias of {', '.join(too_many)}: architecture '{architecture.name}' has none there")
    if config.hidden_act not in ("silu", "swish"):
        raise refuse(f"activation '{config.hidden_act}': architecture '{architecture.name}' computes silu")
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn") or (kind == "llama3" and not architecture.like_llama):
        raise refuse(f"rotary scaling '{kind}': architecture '{architecture.name}' does not compute it")
    for key, value in {"partial_rotary_factor": 1, "mscale": 1, "mscale_all_dim": 1, "truncate": True}.items():
        if rope.get(key) not in (None, value):
            raise refuse(f"rotary parameter {key} {rope[key]}: architecture '{architecture.name}' has none")
    return architecture
