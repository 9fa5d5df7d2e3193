"""A family is tried before it is pruned: what behaves as its record says passes, everything else is refused."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaMLP

from lightning_prune.checkpoint import family_check as proof
from lightning_prune.checkpoint import write
from lightning_prune.checkpoint.family_check import check_family, shrunk
from lightning_prune.models.family import BEFORE_ATTENTION, Norms
from lightning_prune.models.records import FAMILIES
from lightning_prune.support.errors import UserError
from tests.tiny import EVERY_FAMILY, EXPERTS, WHOLE_ATTENTION, make_moe, tiny_config

HEADS = ("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads")
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    proof._tried.cache_clear()
    yield
    proof._tried.cache_clear()


@pytest.mark.parametrize(
    ("family", "switches"),
    [
        *((family, {"kv_heads": 1 + turn % 2, "tied": turn % 2 == 1}) for turn, family in enumerate(EVERY_FAMILY)),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("mistral", {"sliding_window": 7}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
        ("qwen3", {"attention_bias": True}),
        ("gemma2", {"attention_bias": True}),
        ("gemma3_text", {"attention_bias": True, "final_logit_softcapping": 2.0}),
        ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 8}),
        ("granite", {"attention_bias": True, "mlp_bias": True}),
        ("smollm3", {"attention_bias": True, "mlp_bias": True, "use_sliding_window": True, "sliding_window": 6}),
        ("olmo", {"attention_bias": True}),
        ("olmo2", {"attention_bias": True}),
        ("ernie4_5", {"use_bias": True}),
        ("seed_oss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
        ("helium", {"attention_bias": True, "mlp_bias": True}),
        ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
        ("phi", {"partial_rotary_factor": 0.4, "qk_layernorm": True}),  # of 8 dimensions not an even number
        ("gpt_neox", {"use_parallel_residual": False}),
        ("cohere", {"use_qk_norm": True, "attention_bias": True}),
    ],
)
def test_a_family_does_what_its_record_says(family: str, switches: dict[str, Any]) -> None:
    assert set(EVERY_FAMILY) | set(EXPERTS) == set(FAMILIES)
    config, random = tiny_config(family, **switches), torch.random.get_rng_state()
    before = config.to_dict()
    check_family(config)
    assert config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), random)  # a run's random numbers are not touched


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "switches"),
    [
        *((family, {}) for family in EXPERTS),
        ("qwen3_moe", {"attention_bias": True, "decoder_sparse_step": 2}),
        ("qwen2_moe", {"qkv_bias": False, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
        ("mixtral", {"sliding_window": None}),
        ("granitemoe", {"attention_bias": True, "tied": False}),
        ("glm4_moe", {"attention_bias": True, "n_group": 1, "first_k_dense_replace": 3, "n_shared_experts": 2}),
        ("ernie4_5_moe", {"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "use_bias": True}),
        ("gpt_oss", {"attention_bias": False}),
        ("deepseek_v3", {"q_lora_rank": None, "n_group": 1}),
        ("lfm2_moe", {"use_expert_bias": False}),
        ("qwen3_5_moe_text", {"attention_bias": True, "tied": False}),
        ("nemotron_h", {"n_group": 2, "topk_group": 1, "mlp_bias": True}),
        ("nemotron_h", {"moe_latent_size": 20}),
        ("granitemoehybrid", {"attention_bias": True, "tied": False}),
        ("jamba", {"layers": 16, "attn_layer_period": 8, "attn_layer_offset": 4}),  # as published
        ("jamba", {"layers": 16, "attn_layer_period": 8, "attn_layer_offset": 3}),
    ],
)
def test_a_mixture_of_experts_does_what_its_record_says(family: str, switches: dict[str, Any]) -> None:
    check_family(make_moe(family, **switches).config)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_a_large_model_is_tried_in_seconds_and_once_per_kind(family: str) -> None:
    large = AutoConfig.for_model(family)  # as wide and deep as the class has it
    start = time.process_time()
    check_family(large)
    assert time.process_time() - start < 10
    check_family(AutoConfig.for_model(family, hidden_size=2 * large.hidden_size, intermediate_size=77))
    assert (proof._tried.cache_info().misses, proof._tried.cache_info().hits) == (1, 1)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_5_text", {}),
        ("qwen3_5_moe_text", {}),
        ("qwen3_next", {}),
        (
            "gemma4_text",
            {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, **dict(zip(HEADS, (32, 16, 4), strict=True))},
        ),
        (
            "gemma4_unified_text",
            {"attention_k_eq_v": True, "layer_types": ["sliding_attention", "full_attention"] * 15}
            | dict(zip(HEADS, (16, 8, 1), strict=True)),
        ),
        ("nemotron_h", {"hybrid_override_pattern": "M-M-M-M*-M-M-M*-MEM*E"}),
    ],
)
def test_a_published_hybrid_with_few_layers_of_attention_is_tried(family: str, options: dict[str, Any]) -> None:
    check_family(AutoConfig.for_model(family, **options))


def test_the_small_model_has_every_sort_of_layer_of_the_large_one() -> None:
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=12)
    small = shrunk(config)
    assert config.layer_types.index("full_attention") == 5
    assert small.layer_types == ["sliding_attention"] * 3 + ["full_attention"]
    assert (small.num_hidden_layers, small.hidden_size, small.num_key_value_heads) == (4, 48, 2)
    assert config.num_hidden_layers == 12
    assert shrunk(AutoConfig.for_model("qwen3_5_text")).layer_types == ["linear_attention"] * 2 + ["full_attention"] * 2
    assert shrunk(AutoConfig.for_model("deepseek_v3")).first_k_dense_replace == 3
    assert shrunk(AutoConfig.for_model("smollm3")).no_rope_layers == [1, 1, 1, 0]
    assert shrunk(AutoConfig.for_model("llama", num_hidden_layers=1)).num_hidden_layers == 4


SWAPPED = {
    "attention_norms": Norms("input_layernorm", "pre_feedforward_layernorm"),
    "mlp_norms": Norms("post_attention_layernorm", "post_feedforward_layernorm"),
}
LOST = {"attention_norms": BEFORE_ATTENTION}
WRONG: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [  # family, changes of its record, switches, message
    ("gemma2", SWAPPED, {}, "block of layer 0, alone,: differs"),
    ("gemma2", LOST, {}, "layer 0 has 32 parameters that belong to none of its blocks"),
    ("smollm3", {"per_layer_lists": ()}, {"no_rope_layers": [1, 0, 0, 1]}, "family 'smollm3'"),
    ("stablelm", {}, {"use_parallel_residual": True}, "layer 0 has no 'post_attention_layernorm'"),
    # A channel of a shared expert would cost more than one of a routed expert, which has no bias.
    ("ernie4_5_moe", {}, {"use_bias": True}, "family 'ernie4_5_moe' .* where the costs of its units say"),
]
UNWHOLE = "costs of its units|is not the same as masking|Error: "
WRONG += [(family, {"whole_attention": None}, {}, UNWHOLE) for family in WHOLE_ATTENTION]


@pytest.mark.parametrize(("model_type", "changes", "switches", "message"), WRONG)
def test_a_wrong_record_is_refused(
    monkeypatch: pytest.MonkeyPatch, model_type: str, changes: dict[str, Any], switches: dict[str, Any], message: str
) -> None:
    config = make_moe(model_type, **switches).config if model_type in EXPERTS else tiny_config(model_type, **switches)
    monkeypatch.setitem(FAMILIES, model_type, replace(FAMILIES[model_type], **changes))
    with pytest.raises(UserError, match=message) as error:
        check_family(config)
    assert str(error.value).startswith("--model.pretrained: with transformers ")
    assert "docs/add_a_model_family.md" in str(error.value)


def test_layers_without_experts_after_some_with_are_refused_where_the_config_cannot_say_so() -> None:
    with pytest.raises(UserError, match=r"family 'ernie4_5_moe' cannot say once a layer is removed"):
        check_family(make_moe("ernie4_5_moe", moe_layer_interval=2).config)


def test_another_arithmetic_of_a_release_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a way in which a decoder could do more than its parts."""

    def interleaved(self: LlamaAttention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = attention(self, hidden_states, *args, **kwargs)
        return output + 0.1 * hidden_states.mean(), weights  # of what enters, not of what the groups put out

    attention, mlp, head = LlamaAttention.forward, LlamaMLP.forward, LlamaForCausalLM.forward
    layer = GraniteDecoderLayer.forward
    for where, family, changed in (
        (LlamaAttention, "llama", interleaved),
        (LlamaMLP, "llama", lambda self, x: mlp(self, x) + 0.1 * self.gate_proj(x).mean()),
        (LlamaForCausalLM, "llama", lambda self, input_ids=None, **kwargs: _shifted(head, self, input_ids, kwargs)),
        (GraniteDecoderLayer, "granite", lambda self, *args, **kwargs: layer(self, *args, **kwargs) + 1),
    ):
        proof._tried.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(where, "forward", changed)
            with pytest.raises(UserError, match="do not behave as their record says"):
                check_family(tiny_config(family))
    proof._tried.cache_clear()
    check_family(tiny_config("llama"))


def _shifted(head: Any, model: Any, tokens: Tensor | None, kwargs: Any) -> Any:
    output = head(model, input_ids=tokens, **kwargs)
    if tokens is not None:
        output.logits = output.logits + tokens[..., None] * 1e-3
    return output


def test_errors_of_the_machine_are_not_blamed_on_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    for name in ("write_weights", "_write_config"):
        with monkeypatch.context() as patch:
            patch.setattr(write, name, full)
            with pytest.raises(UserError, match=r"cannot be written \(.*No space left.*\)\. .* TMPDIR") as error:
                check_family(tiny_config("llama"))
            assert "do not behave" not in str(error.value)
    check_family(tiny_config("llama"))  # nothing of it is remembered
