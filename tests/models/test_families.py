import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config

from lightning_prune.errors import UserError
from lightning_prune.models.families import anatomy, count_parameters, family_of
from lightning_prune.models.loading import meta_model
from tests.cutting import cut
from tests.tiny import FAMILIES, make_tiny, mixed_plan, tiny_config, tiny_plan

BIASED = [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen3", {"attention_bias": True})]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("family", "extra"), [*((family, {}) for family in FAMILIES), *BIASED])
def test_shapes_and_costs_on_the_meta_device(family: str, extra: dict[str, Any], kv_heads: int) -> None:
    model = meta_model(tiny_config(family, kv_heads=kv_heads, hidden=48, **extra))
    layers = anatomy(model)
    r, d, hidden = 4 // kv_heads, 8, 48
    qkv_bias = (r * d + 2 * d) if family == "qwen2" or "attention_bias" in extra else 0
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    for layer in layers:
        assert layer.query.weight.is_meta
        assert (layer.num_kv_heads, layer.queries_per_kv_head, layer.num_channels) == (kv_heads, r, 40)
        assert layer.attention_unit_cost == 2 * r * d * hidden + 2 * d * hidden + qkv_bias
        assert layer.mlp_unit_cost == 3 * hidden + (2 if "mlp_bias" in extra else 0)
        assert layer.attention_block_cost + layer.mlp_block_cost == count_parameters(layer.layer)


def test_tied_weights_count_once() -> None:
    tied, untied = (count_parameters(meta_model(tiny_config(tied=tied))) for tied in (True, False))
    assert untied - tied == 96 * 32


def test_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'gpt2' is not supported.*llama, mistral, qwen2, qwen3"):
        family_of(GPT2Config())


def test_missing_module_is_named() -> None:
    model = make_tiny()
    del model.model.layers[2].mlp.up_proj
    with pytest.raises(UserError, match=r"layer 2 has no 'mlp\.up_proj'"):
        anatomy(model)


@pytest.mark.parametrize("linear", [nn.Linear(32, 40, bias=False), nn.Linear(32, 32, bias=True)])
def test_shape_or_bias_off_the_record_is_named(linear: nn.Linear) -> None:
    model = make_tiny()
    model.model.layers[1].self_attn.q_proj = linear
    with pytest.raises(UserError, match="layer 1, query projection"):
        anatomy(model)


def test_already_pruned_model_is_refused() -> None:
    model = make_tiny()
    with pytest.raises(UserError, match="already pruned"):
        anatomy(cut(model, mixed_plan(copy.deepcopy(model))))


def test_stock_pruned_model_can_be_pruned_again() -> None:
    model = make_tiny(kv_heads=4)
    pruned = cut(model, tiny_plan(model, [([0, 2, 3], list(range(10)))] * 4))
    again = cut(pruned, tiny_plan(pruned, [([1], [3, 4])] * 4))
    assert anatomy(again)[0].num_kv_heads == 1
    assert again(torch.tensor([[3, 4]])).logits.isfinite().all()
