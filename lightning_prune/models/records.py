"""What the supported model families look like, one record each."""

from dataclasses import replace
from typing import Any

from lightning_prune.models.family import ExpertNames, Family, Norms
from lightning_prune.models.refusals import SHARED
from lightning_prune.models.vocabulary import Block

_ALL_HEADS = "its query and key norms span all heads at once, so the other heads change when one is removed"
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
_FEED_FORWARD: dict[str, Any] = {
    "per_layer_lists": (),
    "final_norm": "model.final_layernorm",
    "mlp": "feed_forward",
    "mlp_norms": Norms("pre_ff_layernorm"),
}
_GEMMA4: dict[str, Any] = {
    "attention_bias": "attention_bias",
    "own_heads": True,
    "scale": "layer_scalar",
    **_SANDWICH,
}
_NORMS_BESIDE = ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2")
_MIXER = (Block.MIXER, Block.MLP)
_SIDE_BY_SIDE: dict[str, Any] = {
    "mlp_norms": Norms(None),
    "blocks": dict.fromkeys(("", "sliding_attention", "full_attention"), _MIXER),
    "mixer": {"self_attn": True},
    "side_by_side": True,
    "whole_attention": _BESIDE,
}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
_QWEN3_5: dict[str, Any] = {
    "attention_bias": "attention_bias",
    "blocks": {"linear_attention": _MIXER},
    "mixer": {"linear_attn": False},
    "gated_query": True,
}
_LFM2: dict[str, Any] = {
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
_GRANITE_EXPERTS = ExpertNames(
    router="router",
    count="num_local_experts",
    width="intermediate_size",
    stored=None,
)
_GRANITE_NAMES = {
    ".block_sparse_moe.input_linear.weight": ".block_sparse_moe.experts.gate_up_proj",
    ".block_sparse_moe.output_linear.weight": ".block_sparse_moe.experts.down_proj",
    ".router.layer.": ".router.",
}
_MAMBA = {"mamba_n_heads": 2, "mamba_d_head": "auto", "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "attention_bias", "mlp_bias", stock_alias="mistral"),
        Family("mistral"),
        Family("qwen2", True, o_bias=False),
        Family("qwen3", "attention_bias"),
        Family("ministral"),
        Family("ministral3"),
        Family("gemma", "attention_bias"),
        Family("gemma2", "attention_bias", **_SANDWICH),
        Family("gemma3_text", "attention_bias", **_SANDWICH),
        Family(
            "gemma4_text",
            **_GEMMA4,
            experts=ExpertNames("router", "", ("router", *_NORMS_BESIDE), "top_k_experts", stored=None),
            refused=lambda config: SHARED if config.num_kv_shared_layers or config.hidden_size_per_layer_input else "",
        ),
        Family("gemma4_unified_text", **_GEMMA4, refused=lambda config: SHARED if config.num_kv_shared_layers else ""),
        Family("phi3", query="qkv_proj", key="qkv_proj", value="qkv_proj", gate="gate_up_proj", up="gate_up_proj"),
        Family("granite", "attention_bias", "mlp_bias"),
        Family("smollm3", "attention_bias", "mlp_bias", per_layer_lists=("layer_types", "no_rope_layers")),
        Family("olmo", "attention_bias"),
        Family("olmo2", "attention_bias", whole_attention=_ALL_HEADS, **_POST_NORMS),
        Family("ernie4_5", "use_bias", "use_bias"),
        Family("seed_oss", "attention_bias", "mlp_bias", o_bias="attention_out_bias"),
        Family("helium", "attention_bias", "mlp_bias", o_bias=False, whole_attention=_FIXED_OUTPUT),
        Family("stablelm", "use_qkv_bias", o_bias=False, whole_attention=_FIXED_OUTPUT),
        Family("qwen3_moe", "attention_bias", experts=ExpertNames()),
        Family(
            "olmoe",
            "attention_bias",
            whole_attention=_ALL_HEADS,
            experts=ExpertNames(width="intermediate_size"),
        ),
        Family(
            "mixtral",
            experts=ExpertNames(count="num_local_experts", width="intermediate_size", stored=("w1", "w3", "w2")),
            renamed={".block_sparse_moe.": ".mlp."},
        ),
        Family("qwen2_moe", "qkv_bias", o_bias=False, experts=ExpertNames(), tiny=_SHARED),
        Family(
            "granitemoe",
            "attention_bias",
            mlp="block_sparse_moe",
            experts=_GRANITE_EXPERTS,
            renamed=_GRANITE_NAMES,
        ),
        Family("glm4_moe", "attention_bias", o_bias=False, experts=_SHARED_EXPERTS),
        Family(
            "ernie4_5_moe",
            "use_bias",
            "use_bias",
            experts=ExpertNames(
                count="moe_num_experts",
                shared="shared_experts",
                shared_count="moe_num_shared_experts",
                dense_first="moe_layer_start_index",
            ),
            renamed={".mlp.moe_statics.": ".mlp.gate.moe_statics."},
        ),
        Family(
            "gpt_oss",
            "attention_bias",
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
        Family("qwen3_next", **_QWEN3_5, experts=ExpertNames(), tiny={**_DELTA_NET, **_SHARED}),
        Family("lfm2", **_LFM2, index_lists=("full_attn_idxs",)),
        Family("lfm2_moe", **_LFM2, experts=ExpertNames(stored=("w1", "w3", "w2"), dense_first="num_dense_layers")),
        Family(
            "granitemoehybrid",
            "attention_bias",
            mlp="shared_mlp",
            gate="input_linear",
            up="input_linear",
            down="output_linear",
            blocks={"linear_attention": _MIXER},
            mixer={"mamba": False},
            width="shared_intermediate_size",
            experts=replace(_GRANITE_EXPERTS, block="block_sparse_moe"),
            renamed=_GRANITE_NAMES,
            tiny=_MAMBA,
        ),
        Family(
            "falcon_h1",
            mlp_bias="mlp_bias",
            **_FEED_FORWARD,
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
            "mlp_bias",
            index_lists=("attn_layer_indices",),
            **_FEED_FORWARD,
            kinds="layers_block_type",
            blocks={"linear_attention": _MIXER},
            mixer={"mamba": False},
            layer_returns=2,
            tiny=_MAMBA,
        ),
        Family(
            "jamba",
            **_FEED_FORWARD,
            kinds="layers_block_type",
            blocks={"mamba": _MIXER},
            mixer={"mamba": False},
            experts=ExpertNames(router="router", width="intermediate_size"),
            period="attn_layer",
            tiny={"mamba_d_state": 8, "mamba_dt_rank": 1},  # whose products are the same wherever weights are in memory
        ),
        Family(
            "phi",
            mlp_bias=True,
            final_norm="model.final_layernorm",
            gate=None,
            up="fc1",
            down="fc2",
            **_SIDE_BY_SIDE,
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
        Family("cohere", **_SIDE_BY_SIDE),
        Family("cohere2", **_SIDE_BY_SIDE),
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
                "moe": (Block.MLP,),
            },
            mixer={"mixer": False},
            experts=ExpertNames(count="n_routed_experts", stored=("up_proj", "down_proj")),
            tiny={
                "mamba_num_heads": 2,
                "mamba_head_dim": 8,
                "ssm_state_size": 4,
                "n_groups": 1,
                "chunk_size": 8,
                "moe_shared_expert_intermediate_size": 12,
                "moe_latent_size": 24,
                "time_step_min": 1e-6,  # in transformers the least of a prefill alone, not of a decoding step
            },
            renamed={"backbone.": "model."},
            derived=("num_hidden_layers", "hybrid_override_pattern"),
        ),
    )
}

# Models of several, of which the text model is taken → a family that it is of.
TEXT_PARTS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
# Text models that have no class of their own for text alone → the family that computes the same.
SAME_TEXT = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
