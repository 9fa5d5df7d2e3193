"""What the supported model families look like, one record each."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_prune.models.vocabulary import BLOCK_OF, ROLES, Block

GUIDE = "docs/add_a_model_family.md"


class Norms(NamedTuple):
    """Norms of a block's input and output, by attribute name below the layer. None: there is none."""

    before: str | None
    after: str | None = None


BEFORE_ATTENTION, BEFORE_MLP = Norms("input_layernorm"), Norms("post_attention_layernorm")


@dataclass(frozen=True)
class Family:
    """One model family of ``transformers``. Adding a family is adding one record to ``FAMILIES``.

    Multipliers, soft caps, rotary tables and masks need no entry: embedding, layers, blocks and head are always run by
    the model's own code (``LayeredModel``).

    Names are attributes below the decoder layer. Roles that name the same projection share its parameter, in the
    order of ``ROLES`` from its first row on. A bias entry is True, False, or the name of the config key that decides.
    ``per_layer_lists`` are config keys holding one entry per layer; entries of removed layers are removed.
    ``stock_alias`` names a family with the same arithmetic that takes head counts which this family's own config
    refuses; it is used only while no projection has a bias. ``whole_attention`` says why GQA groups cannot be removed
    one by one, where they cannot: such a family loses MLP channels and whole layers.
    """

    model_type: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    per_layer_lists: tuple[str, ...] = ()
    stock_alias: str | None = None
    whole_attention: str | None = None
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    attention_norms: Norms = BEFORE_ATTENTION
    mlp_norms: Norms = BEFORE_MLP

    def path_of(self, role: str) -> str:
        """The projection that holds ``role``, below the layer."""
        return f"{self.attention if BLOCK_OF[role] is Block.ATTENTION else self.mlp}.{getattr(self, role)}"

    def bias_of(self, role: str) -> bool | str:
        """The bias entry of ``role``."""
        if BLOCK_OF[role] is Block.MLP:
            return self.mlp_bias
        return self.o_bias if role == "output" else self.qkv_bias

    def roles_at(self, path: str) -> list[str]:
        """The roles that the projection ``path`` below the layer holds, in the order of its rows; none for others."""
        return [role for role in ROLES if self.path_of(role) == path]


_ALL_HEADS = "its query and key norms span all heads at once, so the other heads change when one leaves"
_FIXED_OUTPUT = "transformers derives the shape of its attention from hidden_size, so fewer heads cannot be loaded"
_POST_NORMS: dict[str, Any] = {
    "attention_norms": Norms(None, "post_attention_layernorm"),
    "mlp_norms": Norms(None, "post_feedforward_layernorm"),
}
_SANDWICH: dict[str, Any] = {
    "attention_norms": Norms("input_layernorm", "post_attention_layernorm"),
    "mlp_norms": Norms("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
_TYPES = ("layer_types",)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "attention_bias", "attention_bias", "mlp_bias", stock_alias="mistral"),
        Family("mistral"),
        Family("qwen2", True, per_layer_lists=_TYPES),
        Family("qwen3", "attention_bias", "attention_bias", per_layer_lists=_TYPES),
        Family("ministral", per_layer_lists=_TYPES),
        Family("ministral3"),
        Family("gemma", "attention_bias", "attention_bias"),
        Family("gemma2", "attention_bias", "attention_bias", per_layer_lists=_TYPES, **_SANDWICH),
        Family("gemma3_text", "attention_bias", "attention_bias", per_layer_lists=_TYPES, **_SANDWICH),
        Family("phi3", query="qkv_proj", key="qkv_proj", value="qkv_proj", gate="gate_up_proj", up="gate_up_proj"),
        Family("granite", "attention_bias", "attention_bias", "mlp_bias"),
        Family("smollm3", "attention_bias", "attention_bias", "mlp_bias", (*_TYPES, "no_rope_layers")),
        Family("olmo", "attention_bias", "attention_bias"),
        Family("olmo2", "attention_bias", "attention_bias", whole_attention=_ALL_HEADS, **_POST_NORMS),
        Family("ernie4_5", "use_bias", "use_bias", "use_bias"),
        Family("seed_oss", "attention_bias", "attention_out_bias", "mlp_bias"),
        Family("helium", "attention_bias", mlp_bias="mlp_bias", whole_attention=_FIXED_OUTPUT),
        Family("stablelm", "use_qkv_bias", whole_attention=_FIXED_OUTPUT),
    )
}

TEXT_PARTS = ("gemma3", "mistral3")  # models of several, of which the text model is taken
