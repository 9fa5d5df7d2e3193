"""What the supported model families look like, one record each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_prune.models.vocabulary import BLOCK_OF, EXPERTS, ROLES, ROLES_OF, Block

GUIDE = "docs/add_a_model_family.md"


class Norms(NamedTuple):
    """Norms of a block's input and output, by attribute name below the layer. None: there is none."""

    before: str | None
    after: str | None = None


@dataclass(frozen=True)
class ExpertNames:
    """A block of experts, by attribute name below it, and its sizes, by config key.

    ``stored``: how weight files name gate, up and down of one expert, ``<experts>.<number>.<name>.weight`` each; None
    where they hold the three-dimensional parameters themselves. ``renamed``: parts of names in weight files → in the
    model. ``pair``: whether the block also returns the router's weights.

    ``shared``: an MLP beside the experts that is ``shared_count`` (a config key) times as wide as one of them, so that
    it loses channels with them; one with a width of its own stays whole and needs no entry. ``dense_first``: the config
    key that says how many layers come before the first one with experts.
    """

    router: str = "gate"
    experts: str = "experts"
    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    stored: tuple[str, ...] | None = ("gate_proj", "up_proj", "down_proj")
    renamed: tuple[tuple[str, str], ...] = ()
    pair: bool = False
    shared: str | None = None
    shared_count: str = ""
    dense_first: str | None = None


BEFORE_ATTENTION, BEFORE_MLP = Norms("input_layernorm"), Norms("post_attention_layernorm")
DENSE = (Block.ATTENTION, Block.MLP)


@dataclass(frozen=True, eq=False)
class Family:
    """One model family of ``transformers``. Adding a family is adding one record to ``FAMILIES``.

    Multipliers, soft caps, rotary tables and masks need no entry: embedding, layers, blocks and head are always run by
    the model's own code (``LayeredModel``).

    ``kinds`` is the config key that lists the kind of every layer, and ``blocks`` what a layer of a kind is made of, in
    order; other kinds have attention and MLP. ``mixer``: the modules of a mixer → whether
    they also return attention weights; its norms are those of attention.

    Names are attributes below the decoder layer; ``gate`` is None in an MLP without one. Roles that name the same
    projection share its parameter, in the order of ``ROLES`` from its first row on. A bias entry is True, False, or the
    name of the config key that decides.
    ``per_layer_lists`` are config keys holding one entry per layer; entries of removed layers are removed.
    ``index_lists`` hold the numbers of some layers, and are numbered anew. ``width`` is the config key of F.
    ``gated_query``: the query's rows are, head by head, query and output gate, so there are twice as many.
    ``per_head``: a parameter of the attention with one number for each query head.
    ``layer_returns``: how many values a layer returns in a tuple; 0 for the residual stream itself. ``mlp_scale``:
    what the MLP multiplies the output of its down projection with, if it does. ``tiny`` are config entries that make
    the mixer of a tiny model small. ``has_experts`` says of a config that its model has experts, which
    the record does not treat.
    ``side_by_side``: whether attention (a mixer, which stays whole) and MLP both read the layer's input; True, False,
    or the config key that decides. ``renamed``: how names in weight files begin → in the model.
    ``derived``: keys that transformers computes from others and does not write, and that other runtimes read.
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
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    attention_norms: Norms = BEFORE_ATTENTION
    mlp_norms: Norms = BEFORE_MLP
    experts: ExpertNames | None = None
    kinds: str = "layer_types"
    blocks: Mapping[str, tuple[Block, ...]] = field(default_factory=dict)
    mixer: Mapping[str, bool] = field(default_factory=dict)
    index_lists: tuple[str, ...] = ()
    width: str = "intermediate_size"
    gated_query: bool = False
    per_head: str | None = None
    layer_returns: int = 0
    mlp_scale: Callable[[Any], float | None] = lambda config: None
    has_experts: Callable[[Any], bool] = lambda config: False
    tiny: Mapping[str, Any] = field(default_factory=dict)
    side_by_side: bool | str = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    derived: tuple[str, ...] = ()

    def blocks_of(self, config: Any, index: int) -> tuple[Block, ...]:
        """What layer ``index`` of a model with ``config`` is made of, in the order of execution."""
        kinds = getattr(config, self.kinds, None)
        return self.blocks.get(kinds[index] if kinds else "", DENSE)

    def modules_of(self, block: Block) -> dict[str, bool]:
        """The modules whose outputs a block adds to the residual stream, below the layer → whether they also return
        attention weights."""
        if block is Block.MIXER:
            return dict(self.mixer)
        if block in EXPERTS and self.experts is not None:
            return {self.mlp: self.experts.pair}
        return {self.attention: True} if block is Block.ATTENTION else {self.mlp: False}

    def norms_of(self, block: Block) -> Norms:
        """The norms of a block."""
        return self.mlp_norms if block.place else self.attention_norms

    def roles_of(self, block: Block) -> list[str]:
        """The roles of a block's projections, the one that writes to the residual stream last."""
        return [role for role in ROLES_OF.get(block, ()) if getattr(self, role)]

    def path_of(self, role: str) -> str:
        """The projection that holds ``role``, below the layer."""
        return f"{self.attention if BLOCK_OF[role] is Block.ATTENTION else self.mlp}.{getattr(self, role)}"

    def bias_of(self, role: str) -> bool | str:
        """The bias entry of ``role``."""
        if BLOCK_OF[role] is Block.MLP:
            return self.mlp_bias
        return self.o_bias if role == "output" else self.qkv_bias

    @staticmethod
    def says(config: Any, entry: bool | str) -> bool:
        """The value of an entry that may name the config key that decides."""
        return bool(getattr(config, entry, False)) if isinstance(entry, str) else entry

    def roles_at(self, path: str) -> list[str]:
        """The roles that the projection ``path`` below the layer holds, in the order of its rows; none for others."""
        return [role for role in ROLES if self.path_of(role) == path]


_ALL_HEADS = "its query and key norms span all heads at once, so the other heads change when one leaves"
_FIXED_OUTPUT = "transformers derives the shape of its attention from hidden_size, so fewer heads cannot be loaded"
_BESIDE = "its attention and its MLP read the same input side by side, and the attention is kept as one block"
_HYBRID = "its attention and its state space read the same input side by side, and are kept as one block"
_POST_NORMS: dict[str, Any] = {
    "attention_norms": Norms(None, "post_attention_layernorm"),
    "mlp_norms": Norms(None, "post_feedforward_layernorm"),
}
_SANDWICH: dict[str, Any] = {
    "attention_norms": Norms("input_layernorm", "post_attention_layernorm"),
    "mlp_norms": Norms("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
_TYPES = ("layer_types",)
_MIXER = (Block.MIXER, Block.MLP)
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
_QWEN3_5: dict[str, Any] = {
    "qkv_bias": "attention_bias",
    "o_bias": "attention_bias",
    "per_layer_lists": _TYPES,
    "blocks": {"linear_attention": _MIXER},
    "mixer": {"linear_attn": False},
    "gated_query": True,
}
_LFM2: dict[str, Any] = {
    "per_layer_lists": _TYPES,
    "final_norm": "model.embedding_norm",
    "output": "out_proj",
    "mlp": "feed_forward",
    "gate": "w1",
    "up": "w3",
    "down": "w2",
    "attention_norms": Norms("operator_norm"),
    "mlp_norms": Norms("ffn_norm"),
    "blocks": {"conv": _MIXER},
    "mixer": {"conv": False},
}
_SHARED_EXPERTS = ExpertNames(
    count="n_routed_experts",
    shared="shared_experts",
    shared_count="n_shared_experts",
    dense_first="first_k_dense_replace",
)
_SHARED = {"shared_expert_intermediate_size": 12}
_MAMBA = {"mamba_n_heads": 2, "mamba_d_head": "auto", "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}

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
        Family("qwen3_moe", "attention_bias", "attention_bias", experts=ExpertNames()),
        Family(
            "olmoe",
            "attention_bias",
            "attention_bias",
            whole_attention=_ALL_HEADS,
            experts=ExpertNames(width="intermediate_size"),
        ),
        Family(
            "mixtral",
            experts=ExpertNames(
                count="num_local_experts",
                width="intermediate_size",
                stored=("w1", "w3", "w2"),
                renamed=((".block_sparse_moe.", ".mlp."),),
            ),
        ),
        Family("qwen2_moe", "qkv_bias", per_layer_lists=_TYPES, experts=ExpertNames(), tiny=_SHARED),
        Family(
            "granitemoe",
            "attention_bias",
            "attention_bias",
            mlp="block_sparse_moe",
            experts=ExpertNames(
                router="router",
                count="num_local_experts",
                width="intermediate_size",
                stored=None,
                renamed=(
                    (".input_linear.weight", ".experts.gate_up_proj"),
                    (".output_linear.weight", ".experts.down_proj"),
                    (".router.layer.", ".router."),
                ),
            ),
        ),
        Family("glm4_moe", "attention_bias", experts=_SHARED_EXPERTS),
        Family(
            "ernie4_5_moe",
            "use_bias",
            "use_bias",
            "use_bias",
            experts=ExpertNames(
                count="moe_num_experts",
                renamed=((".mlp.moe_statics.", ".mlp.gate.moe_statics."),),
                shared="shared_experts",
                shared_count="moe_num_shared_experts",
                dense_first="moe_layer_start_index",
            ),
        ),
        Family(
            "gpt_oss",
            "attention_bias",
            "attention_bias",
            per_layer_lists=_TYPES,
            per_head="sinks",
            experts=ExpertNames(
                router="router", count="num_local_experts", width="intermediate_size", stored=None, pair=True
            ),
        ),
        Family(
            "deepseek_v3",
            blocks={"": _MIXER},
            mixer={"self_attn": True},
            experts=_SHARED_EXPERTS,
            tiny={"q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
        ),
        Family("qwen3_5_text", **_QWEN3_5, tiny=_DELTA_NET),
        Family(
            "qwen3_5_moe_text",
            **_QWEN3_5,
            width="shared_expert_intermediate_size",  # it has no layer without experts
            experts=ExpertNames(),
            tiny={**_DELTA_NET, **_SHARED},
        ),
        Family("lfm2", **_LFM2, index_lists=("full_attn_idxs",)),
        Family("lfm2_moe", **_LFM2, experts=ExpertNames(stored=("w1", "w3", "w2"), dense_first="num_dense_layers")),
        Family(
            "granitemoehybrid",
            "attention_bias",
            "attention_bias",
            per_layer_lists=_TYPES,
            mlp="shared_mlp",
            gate="input_linear",
            up="input_linear",
            down="output_linear",
            blocks={"linear_attention": _MIXER},
            mixer={"mamba": False},
            width="shared_intermediate_size",
            has_experts=lambda config: config.num_local_experts > 0,
            tiny=_MAMBA,
        ),
        Family(
            "falcon_h1",
            mlp_bias="mlp_bias",
            final_norm="model.final_layernorm",
            mlp="feed_forward",
            mlp_norms=Norms("pre_ff_layernorm"),
            kinds="layers_block_type",
            blocks={"hybrid": _MIXER},
            mixer={"mamba": False, "self_attn": True},
            whole_attention=_HYBRID,
            layer_returns=1,
            mlp_scale=lambda config: config.mlp_multipliers[1],
            tiny={**_MAMBA, "mamba_d_ssm": 16},
        ),
        Family(
            "bamba",
            "attention_bias",
            "attention_bias",
            "mlp_bias",
            index_lists=("attn_layer_indices",),
            final_norm="model.final_layernorm",
            mlp="feed_forward",
            mlp_norms=Norms("pre_ff_layernorm"),
            kinds="layers_block_type",
            blocks={"linear_attention": _MIXER},
            mixer={"mamba": False},
            layer_returns=2,
            tiny=_MAMBA,
        ),
        Family(
            "phi",
            mlp_bias=True,
            final_norm="model.final_layernorm",
            gate=None,
            up="fc1",
            down="fc2",
            mlp_norms=Norms(None),
            blocks={"": _MIXER},
            mixer={"self_attn": True},
            side_by_side=True,
            whole_attention=_BESIDE,
        ),
        Family(
            "gpt_neox",
            mlp_bias=True,
            layers="gpt_neox.layers",
            final_norm="gpt_neox.final_layer_norm",
            attention="attention",
            gate=None,
            up="dense_h_to_4h",
            down="dense_4h_to_h",
            blocks={"": _MIXER},
            mixer={"attention": True},
            side_by_side="use_parallel_residual",
            whole_attention=_BESIDE,
            renamed={"embed_out.": "lm_head."},
        ),
        *(
            Family(
                name,
                per_layer_lists=_TYPES,
                mlp_norms=Norms(None),
                blocks=dict.fromkeys(("", "sliding_attention", "full_attention"), _MIXER),
                mixer={"self_attn": True},
                side_by_side=True,
                whole_attention=_BESIDE,
            )
            for name in ("cohere", "cohere2")
        ),
        Family(
            "nemotron_h",
            mlp_bias="mlp_bias",
            per_layer_lists=("layers_block_type",),
            final_norm="model.norm_f",
            attention="mixer",
            mlp="mixer",
            gate=None,
            attention_norms=Norms("norm"),
            mlp_norms=Norms("norm"),
            kinds="layers_block_type",
            blocks={
                "linear_attention": (Block.MIXER,),
                "full_attention": (Block.ATTENTION,),
                "mlp": (Block.MLP,),
            },
            mixer={"mixer": False},
            has_experts=lambda config: "moe" in config.layers_block_type,
            tiny={"mamba_num_heads": 2, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "chunk_size": 8},
            renamed={"backbone.": "model."},
            derived=("num_hidden_layers", "hybrid_override_pattern"),
        ),
    )
}

# Models of several, of which the text model is taken → a family that it is of.
TEXT_PARTS = {"gemma3": "gemma3_text", "mistral3": "mistral"}
