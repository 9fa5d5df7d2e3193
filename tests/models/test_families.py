import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lightning_prune.models.checkpoint import Checkpoint, meta_model
from lightning_prune.models.families import choose_layers, count_parameters, family_of, layer_structures
from lightning_prune.models.family import GUIDE
from lightning_prune.models.records import FAMILIES as FAMILIES_OF_RECORD
from lightning_prune.models.records import TEXT_PARTS
from lightning_prune.models.refusals import ENCODER_DECODER, FAMILIES_BY_REASON, REFUSED, SEVERAL_MODELS
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from tests.cutting import cut, layered
from tests.tiny import FAMILIES, make_moe, make_tiny, mixed_plan, tiny_config, tiny_tokens
from tools import families_table

ROOT = Path(__file__).parent.parent.parent
BIASED = [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen3", {"attention_bias": True})]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("family", "extra"), [*((family, {}) for family in FAMILIES), *BIASED])
def test_shapes_and_costs_on_the_meta_device(family: str, extra: dict[str, Any], kv_heads: int) -> None:
    model = meta_model(tiny_config(family, kv_heads=kv_heads, hidden=48, **extra))
    layers = layer_structures(model)
    r, d, hidden = 4 // kv_heads, 8, 48
    qkv_bias = (r * d + 2 * d) if family == "qwen2" or "attention_bias" in extra else 0
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    for layer in layers:
        assert layer.linears["query"].weight.is_meta
        assert (layer.units(Block.ATTENTION), layer.units(Block.MLP)) == (kv_heads, 40)
        assert layer.unit_cost(Block.ATTENTION) == 2 * r * d * hidden + 2 * d * hidden + qkv_bias
        assert layer.unit_cost(Block.MLP) == 3 * hidden + (2 if "mlp_bias" in extra else 0)
        assert (
            layer.cost
            == layer.block_cost(Block.ATTENTION) + layer.block_cost(Block.MLP)
            == count_parameters(layer.layer)
        )


@pytest.mark.parametrize("model_type", ["bert", "t5", "llava", "dbrx", "mamba", "gptj"])
def test_what_is_not_pruned_is_refused_with_the_families_and_a_reason_or_the_guide(model_type: str) -> None:
    unknown = model_type == "bert"
    reason = r"\." if unknown else r": \w+ .* \w+\."
    with pytest.raises(UserError, match=rf"'{model_type}' is not supported{reason} .*llama, .*qwen3") as error:
        family_of(AutoConfig.for_model(model_type))
    assert (GUIDE in str(error.value)) == unknown
    assert (ROOT / GUIDE).is_file()


def test_the_page_on_families_names_every_record_and_every_refusal() -> None:
    supported, refused = (ROOT / "docs" / "families.md").read_text(encoding="utf-8").split("## Refused")
    named = {name for line in supported.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line)}
    assert named - {"model_type"} == {*FAMILIES_OF_RECORD, *TEXT_PARTS} == set(families_table.MODELS)
    page = families_table.PAGE.read_text(encoding="utf-8")
    assert families_table.written(page) == page, "python tools/families_table.py writes the table anew"
    for reason, names in FAMILIES_BY_REASON.items():
        row = next(line for line in refused.splitlines() if line.startswith(f"| {reason} |"))
        assert re.findall(r"`([\w-]+)`", row) == names.split()
    assert all(reason in refused for reason in (ENCODER_DECODER, SEVERAL_MODELS))


def test_every_name_is_one_that_transformers_knows() -> None:
    assert {*FAMILIES_OF_RECORD, *TEXT_PARTS, *REFUSED} <= set(CONFIG_MAPPING_NAMES)
    assert not set(FAMILIES_OF_RECORD) & set(REFUSED)


def test_roles_of_a_fused_projection_are_its_consecutive_rows() -> None:
    model = make_tiny("phi3")
    linears, fused = layer_structures(model)[1].linears, model.model.layers[1].self_attn.qkv_proj.weight
    parts = [linears[role] for role in ("query", "key", "value")]
    assert [len(part.weight) for part in parts] == [32, 16, 16]
    assert torch.equal(torch.cat([part.weight for part in parts]), fused)
    before = fused.clone()
    parts[1].weight = torch.zeros(16, 32)
    after = model.model.layers[1].self_attn.qkv_proj.weight
    assert torch.equal(after[:32], before[:32])
    assert not after[32:48].any()
    assert torch.equal(after[48:], before[48:])
    assert not after.requires_grad
    assert torch.equal(fused, before)  # a view of a checkpoint file is not written to


@pytest.mark.parametrize(
    ("family", "place", "linear", "message"),
    [
        ("llama", "mlp.up_proj", None, r"layer 2 has no 'mlp\.up_proj'"),
        ("llama", "self_attn.q_proj", nn.Linear(32, 40, bias=False), "layer 2, query projection"),
        ("llama", "self_attn.q_proj", nn.Linear(32, 32, bias=True), "layer 2, query projection"),
        ("phi3", "mlp.gate_up_proj", nn.Linear(32, 81, bias=False), "layer 2, up projection"),
    ],
)
def test_a_layer_off_the_record_is_named(family: str, place: str, linear: nn.Module | None, message: str) -> None:
    model = make_tiny(family)
    block, _, name = place.partition(".")
    owner = model.model.layers[2].get_submodule(block)
    delattr(owner, name)
    if linear is not None:
        setattr(owner, name, linear)
    with pytest.raises(UserError, match=message):
        layer_structures(model)


def test_pruned_model_has_the_units_that_are_left() -> None:
    model = make_tiny()
    pruned = cut(model, mixed_plan(copy.deepcopy(model)))
    views = layer_structures(meta_model(pruned.config))
    assert [(view.units(Block.ATTENTION), view.units(Block.MLP)) for view in views] == [(0, 40), (1, 20), (2, 0)]
    assert [view.unit_cost(Block.MLP) for view in views] == [3 * 32, 3 * 32, 0]
    assert [view.block_cost(Block.ATTENTION) for view in views] == [0, 1 * 3 * 2 * 8 * 32 + 32, 2 * 3 * 2 * 8 * 32 + 32]
    with torch.no_grad():
        assert torch.equal(layered(pruned).logits(tiny_tokens()), pruned(tiny_tokens()).logits)


def test_the_width_of_an_lfm2_is_the_one_that_its_code_makes_of_the_config(tmp_path: Path) -> None:
    adjusted = {"block_auto_adjust_ff_dim": True, "block_multiple_of": 16, "block_ffn_dim_multiplier": 1.5}
    model = make_tiny("lfm2", channels=57, **adjusted)
    model.save_pretrained(tmp_path)
    opened = Checkpoint.open(str(tmp_path))
    assert len(model.model.layers[0].feed_forward.w1.weight) == 64  # 1.5 * (57 * 2 // 3), up to a multiple of 16
    assert (opened.config.intermediate_size, opened.config.block_auto_adjust_ff_dim) == (64, False)
    assert [view.units(Block.MLP) for view in layer_structures(opened.meta)] == [64] * 4
    tokens = tiny_tokens()
    assert torch.equal(opened.load(None)(tokens).logits, model(tokens).logits)


def test_a_layer_says_what_it_is_made_of() -> None:
    mixer, attention = (Block.MIXER, Block.MLP), (Block.ATTENTION, Block.MLP)
    for family, blocks in {"lfm2": [mixer, attention] * 2, "falcon_h1": [mixer] * 4, "llama": [attention] * 4}.items():
        views = layer_structures(make_tiny(family))
        assert [view.blocks for view in views] == blocks
        assert all(view.cost == count_parameters(view.layer) for view in views)


@pytest.mark.parametrize(
    ("left", "keys"),
    [([0, 1, 4, 5], (2, 1)), ([1, 2, 3, 4], (2, 0)), ([0, 2, 6], (4, 3)), ([0, 1, 2, 3], (2, 1)), ([1, 3, 4, 5], None)],
)
def test_layers_by_period_keep_one_or_are_refused(left: list[int], keys: tuple[int, int] | None) -> None:
    """Experts in layers 1, 3, 5 and 7, attention in 3 and 7."""
    config = make_moe("jamba", layers=8, attn_layer_period=4, attn_layer_offset=3).config
    target = copy.deepcopy(config)
    if keys is None:
        with pytest.raises(UserError, match=r"expert_layer_offset would be 0, 1, 3, which no period says. Remove no"):
            choose_layers(target, config, left)
        return
    choose_layers(target, config, left)
    assert (target.expert_layer_period, target.expert_layer_offset) == keys
    assert target.layers_num_experts == [config.layers_num_experts[layer] for layer in left]
    assert target.layers_block_type == [config.layers_block_type[layer] for layer in left]
