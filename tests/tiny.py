"""Tiny random models: small enough that a test may build a dozen."""

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.models.families import family_of, kv_heads_of
from lightning_prune.models.records import FAMILIES as FAMILIES_OF_RECORD
from lightning_prune.models.vocabulary import Block

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)  # a pre-norm layer of seven plain projections, plain embedding and head
EXPERTS = (
    *("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "granitemoe", "glm4_moe", "ernie4_5_moe", "gpt_oss"),
    *("deepseek_v3", "qwen3_5_moe_text", "qwen3_next", "lfm2_moe", "nemotron_h", "granitemoehybrid"),
    *("jamba", "gemma4_text"),
)  # see make_moe
WHOLE_ATTENTION = ("olmo2", "helium", "stablelm")  # GQA groups cannot leave one by one
CUTTABLE = (
    *FAMILIES,
    *("ministral", "ministral3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "smollm3", "olmo"),
    *("ernie4_5", "seed_oss", "gemma4_text", "gemma4_unified_text"),
)
HYBRIDS = (
    "qwen3_5_text",
    "jamba",
    "lfm2",
    "granitemoehybrid",
    "falcon_h1",
    "bamba",
    "nemotron_h",
)  # some layers have a mixer that stays whole
ONE_BLOCK = ("nemotron_h",)  # a layer is attention, an MLP or a mixer
SIDE_BY_SIDE = ("phi", "gpt_neox", "cohere", "cohere2")  # attention, which stays whole, beside the MLP
EVERY_FAMILY = (*CUTTABLE, *WHOLE_ATTENTION, *HYBRIDS, *SIDE_BY_SIDE)
MAMBA = {"mamba_n_heads": 2, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
JAMBA = {
    "mamba_d_state": 8,
    "mamba_dt_rank": 1,  # with more, products of few tokens depend on where in memory a weight is
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.5,
}
QWEN3_5 = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
GEMMA4 = {
    "initializer_range": 0.1,
    "sliding_window": 5,
    "global_head_dim": 16,
    "attention_k_eq_v": True,
    "final_logit_softcapping": 3.0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
}
SWITCHES: dict[str, dict[str, Any]] = {  # what makes a tiny model of the family unlike a Llama
    "ministral": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "gemma2": {
        "sliding_window": 5,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "sliding_window": 5,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma4_text": {**GEMMA4, "hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {**GEMMA4, "attention_k_eq_v": False},
    "phi3": {"partial_rotary_factor": 0.5},
    "granite": GRANITE,
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
    "olmo": {"clip_qkv": 1.5},
    "qwen3_5_text": QWEN3_5,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 40,
        "position_embedding_type": "rope",
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.5,
    },
    "falcon_h1": {
        **MAMBA,
        "mamba_d_ssm": 32,
        "key_multiplier": 0.5,
        "mlp_multipliers": [0.7, 0.6],
        "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
        "attention_out_multiplier": 0.6,
        "embedding_multiplier": 3.0,
        "lm_head_multiplier": 0.5,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"clip_qkv": 1.5},
    "mixtral": {"sliding_window": 5},
    "qwen2_moe": {"shared_expert_intermediate_size": 20, "mlp_only_layers": [1], "decoder_sparse_step": 1},
    "granitemoe": GRANITE,
    "glm4_moe": {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5, "use_qk_norm": True},
    "deepseek_v3": {
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 8,
        "v_head_dim": 7,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "rope_interleave": True,
    },
    "qwen3_5_moe_text": {**QWEN3_5, "shared_expert_intermediate_size": 20},
    "qwen3_next": {**QWEN3_5, "shared_expert_intermediate_size": 20},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "gpt_oss": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "nemotron_h": {
        "layers_block_type": ["mlp", "mlp", "full_attention", "linear_attention"],
        "mamba_num_heads": 2,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "n_groups": 1,
        "chunk_size": 8,
        "time_step_min": 1e-6,  # transformers has a least step in the prefill alone
    },
    "jamba": {**JAMBA, "num_experts": 1},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.5},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"sliding_window": 5, "logit_scale": 0.5, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


# The same of one with experts, where the family has models without, too.
SWITCHES_OF_EXPERTS: dict[str, dict[str, Any]] = {
    "gemma4_text": {"enable_moe_block": True},
    "jamba": {**JAMBA, "attn_layer_period": 3},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "moe_shared_expert_intermediate_size": 20,
        "routed_scaling_factor": 1.5,
    },
}


def tiny_config(
    family: str = "llama",
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = True,
    layers: int = 4,
    hidden: int = 32,
    channels: int = 40,
    head_dim: int = 8,
    **extra: Any,
) -> PretrainedConfig:
    """A config with 96 tokens and 128 positions; ``extra`` goes to the family's config class as it is."""
    groups = {} if family == "gpt_neox" else {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    return AutoConfig.for_model(
        family,
        hidden_size=hidden,
        intermediate_size=channels,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        **groups | {"vocab_size": 96, "initializer_range": 0.2} | _switches(SWITCHES, family, layers) | extra,
    )


def _switches(of: dict[str, dict[str, Any]], family: str, layers: int) -> dict[str, Any]:
    """With one entry per layer where there is one per layer of four."""
    return {
        name: [value[layer % len(value)] for layer in range(layers)]
        if isinstance(value, list) and len(value) == 4
        else value
        for name, value in of.get(family, {}).items()
    }


def make_tiny(family: str = "llama", seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random fp32 model in eval mode. Norm weights and biases are random too, so that losing one shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **options), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            for name, buffer in model.state_dict().items():
                if name.endswith("layer_scalar"):
                    buffer.add_(0.1 * torch.randn_like(buffer))
    return model.eval()


def tiny_tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """int64 ``[batch, length]``, special tokens left out."""
    return torch.randint(2, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_plan(model: PreTrainedModel, kept: list[tuple[list[int], list[int]]], **fields: Any) -> PruningPlan:
    """A plan that keeps (KV heads, channels) ``kept[i]`` of layer i, and a mixer where it keeps anything; ``fields``
    replace the plan's own."""
    dense = sum(parameter.numel() for parameter in model.parameters())
    defaults: dict[str, Any] = {
        "method": "by-hand",
        "pruning_ratio": 0.2,
        "achieved_ratio": 0.19,
        "parameters": {"dense": dense, "pruned": 0},
        "calibration_fingerprint": None,
        "base_model": "tiny",
        "layers": [_layer_plan(model, index, *lists) for index, lists in enumerate(kept)],
    }
    return PruningPlan(**(defaults | fields))


def _layer_plan(model: PreTrainedModel, index: int, heads: list[int], channels: list[int]) -> LayerPlan:
    family = family_of(model.config)
    units = {Block.ATTENTION: heads, Block.MLP: channels, Block.MIXER: [0] if heads or channels else []}
    return LayerPlan(index, {block: units[block] for block in family.blocks_of(model.config, index)})


def mixed_plan(model: PreTrainedModel, **fields: Any) -> PruningPlan:
    """For four layers of 40 channels: no attention, narrower, no MLP, nothing left."""
    heads, fewer, _ = _group_lists(model)
    kept = [([], list(range(40))), (fewer, list(range(1, 40, 2))), (heads, []), ([], [])]
    return tiny_plan(model, kept, **fields)


def uniform_plan(model: PreTrainedModel, **fields: Any) -> PruningPlan:
    """For four layers of 40 channels: one less, and the others equally narrower, by other indices in each."""
    _, fewer, others = _group_lists(model)
    kept = [(fewer, list(range(24))), ([], []), (others, list(range(16, 40)))]
    return tiny_plan(model, [*kept, (fewer, list(range(8, 32)))], **fields)


def _group_lists(model: PreTrainedModel) -> tuple[list[int], list[int], list[int]]:
    """All GQA groups, and all but the first or the last where there are several that may leave."""
    heads = list(range(kv_heads_of(model.config)))
    if len(heads) == 1 or model.config.model_type in WHOLE_ATTENTION:
        return heads, heads, heads
    return heads, heads[1:], heads[:-1]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words ``w0`` … ``w95``, one token each; ``w0`` starts and ``w1`` ends a text."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w2"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w0", eos_token="w1", unk_token="w2", pad_token="w1", padding_side="left"
    )


def make_moe(family: str = "qwen3_moe", seed: int = 0, num_experts: int = 8, width: int = 12, **options: Any) -> Any:
    """``make_tiny`` with ``num_experts`` experts of ``width``, two per token."""
    names: Any = FAMILIES_OF_RECORD[family].experts
    wide = "channels" if names.width == "intermediate_size" else names.width
    top_k = names.top_k or ("moe_k" if family == "ernie4_5_moe" else "num_experts_per_tok")
    own = _switches(SWITCHES_OF_EXPERTS, family, options.get("layers", 4))
    own |= {"kv_heads": 4} if family == "deepseek_v3" else {}  # which has as many as there are query heads
    model = make_tiny(family, seed, **own | {top_k: 2, names.count: num_experts, wide: width} | options)
    for name, tensor in model.state_dict().items():
        if name.endswith(("correction_bias", "expert_bias")):  # which initialisation leaves at zero
            tensor.copy_(0.3 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)))
    return model


class Beside(torch.nn.Module):
    """Router and experts of a layer that holds them itself, without its norms."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.router, self.experts = layer.router, layer.experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.router(x.flatten(0, -2))
        return self.experts(x.flatten(0, -2), index, weights.to(x)).view_as(x)  # type: ignore[no-any-return]


def moe_block(model: Any) -> Any:
    """The block of experts of the first layer that has one."""
    if hasattr(first := model.model.layers[0], "experts"):
        return Beside(first)
    return next(part for layer in model.model.layers for part in layer.children() if hasattr(part, "experts"))


def in_double(model: Any) -> Any:
    """The block of experts of the first layer with one in float64, which transformers' grouped products do not take."""
    model.config._experts_implementation = "eager"
    return moe_block(model).double()
