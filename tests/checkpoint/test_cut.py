import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import lightning_prune
from lightning_prune.checkpoint.cut import check_plan, layout_of, parameters_after, pruned_config
from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.checkpoint.pruned import open_pruned
from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import count_parameters, layer_structures
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from tests.cutting import cut, layered_cut
from tests.tiny import CUTTABLE, FAMILIES, WHOLE_ATTENTION, make_tiny, mixed_plan, tiny_plan, tiny_tokens, uniform_plan

KINDS = [
    *((family, kv_heads, {}) for family in FAMILIES for kv_heads in (4, 2, 1)),
    ("llama", 2, {"attention_bias": True, "mlp_bias": True}),
    ("llama", 4, {"attention_bias": True}),
    ("llama", 2, {"head_dim": 16, "hidden": 48}),
    ("qwen3", 2, {"attention_bias": True}),
    ("mistral", 2, {"sliding_window": 5}),
    ("qwen2", 2, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
]
KINDS += [(family, kv_heads, {}) for family in CUTTABLE if family not in FAMILIES for kv_heads in (4, 2)]
KINDS += [(family, 2, {}) for family in WHOLE_ATTENTION]
CHECK_THEIR_HEADS = ("gemma2", "gemma3_text")  # configs that refuse 3 heads for a hidden size of 32, and have no alias
PLANS = {"mixed": mixed_plan, "uniform": uniform_plan}
FULL = list(range(40))


def zeroed(dense: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """The dense model with the removed units' outputs set to zero, weight by weight."""
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for layer, kept, own in zip(model.model.layers, plan.layers, model.config.per_layer_config, strict=True):
            d, r = own.head_dim, own.num_attention_heads // own.num_key_value_heads
            if kept.removed and hasattr(layer, "layer_scalar"):
                layer.layer_scalar.fill_(1)
            for j in range(own.num_key_value_heads):
                if j not in kept.kept[Block.ATTENTION]:
                    layer.self_attn.o_proj.weight[:, j * r * d : (j + 1) * r * d] = 0
            for c in range(model.config.intermediate_size):
                if c not in kept.kept[Block.MLP]:
                    layer.mlp.down_proj.weight[:, c] = 0
            for linear, left in (
                (layer.self_attn.o_proj, kept.kept[Block.ATTENTION]),
                (layer.mlp.down_proj, kept.kept[Block.MLP]),
            ):
                if linear.bias is not None and not left:
                    linear.bias.zero_()
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize(("family", "kv_heads", "extra"), KINDS)
def test_cutting_equals_zeroing(family: str, kv_heads: int, extra: dict[str, Any], plan_name: str, tied: bool) -> None:
    dense = make_tiny(family, kv_heads=kv_heads, tied=tied, **extra)
    plan, before = PLANS[plan_name](dense), dense.config.to_dict()
    pruned = cut(dense, plan)
    expected = zeroed(dense, plan)(tiny_tokens()).logits
    torch.testing.assert_close(pruned(tiny_tokens()).logits, expected, rtol=1e-5, atol=1e-5)
    assert count_parameters(pruned) == parameters_after(layer_structures(dense), count_parameters(dense), plan.layers)
    assert dense.config.to_dict() == before
    if family == "llama" and kv_heads == 4 and plan_name == "uniform" and not extra:  # 3 heads, which Llama refuses
        assert (pruned.config.model_type, pruned.config.sliding_window) == ("mistral", None)
    assert layout_of(pruned.config) == (
        "per-layer"
        if plan_name == "mixed" or (kv_heads == 4 and ("attention_bias" in extra or family in CHECK_THEIR_HEADS))
        else "stock"
    )


# Gemma 4: query heads are as many in every layer, KV heads and head sizes differ by its kind.
HEADS_OF_ITS_OWN = {
    "heads": 8,
    "kv_heads": 4,
    "num_global_key_value_heads": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
OTHER_HEADS = {
    "as many query heads left": ([([1, 3], FULL[8:]), ([0], FULL[:32])] * 2, "stock", [(4, 2, 8), (4, 1, 16)] * 2),
    "others left": ([([1, 2, 3], FULL), ([1], FULL)] * 2, "per-layer", [(6, 3, 8), (4, 1, 16)] * 2),
    "a full attention gone": ([([0, 1, 2, 3], FULL), ([], FULL)] * 2, "per-layer", [(8, 4, 8), (4, 1, 16)] * 2),
    "channels": ([([0, 1, 2, 3], FULL[8:]), ([0, 1], FULL[:32])] * 2, "stock", [(8, 4, 8), (8, 2, 16)] * 2),
    "a layer": ([([], []), *[([0, 1], FULL), ([0, 1, 2, 3], FULL)], ([0, 1], FULL)], "stock", [(8, 2, 16), (8, 4, 8)]),
    "the last layer": ([*[([0, 1, 2, 3], FULL), ([0, 1], FULL)], ([0, 1, 2, 3], FULL), ([], [])], "per-layer", []),
}


@pytest.mark.parametrize("case", OTHER_HEADS)
@torch.no_grad()
def test_layers_with_heads_of_their_own_stay_so_and_can_be_pruned_again(case: str, tmp_path: Path) -> None:
    kept, layout, heads = OTHER_HEADS[case]
    dense = make_tiny("gemma4_text", **HEADS_OF_ITS_OWN)
    plan = tiny_plan(dense, kept)
    pruned = layered_cut(dense, plan)
    assert layout_of(pruned.config) == layout
    found = [(own.num_attention_heads, own.num_key_value_heads, own.head_dim) for own in pruned.config.per_layer_config]
    assert found[: len(heads)] == heads
    write_checkpoint(pruned, tmp_path / "once", beside=None, card="")
    logits = lightning_prune.load(tmp_path / "once")(tiny_tokens()).logits
    torch.testing.assert_close(logits, zeroed(dense, plan)(tiny_tokens()).logits, rtol=1e-5, atol=1e-5)
    once = Checkpoint.open(str(tmp_path / "once"))
    assert once.config.layer_types == [dense.config.layer_types[one.layer] for one in plan.layers if not one.removed]
    views = layer_structures(once.meta)
    units = [{**view.all_units, Block.MLP: FULL[4 : view.units(Block.MLP)]} for view in views]
    again = replace(plan, layers=[LayerPlan(index, of) for index, of in enumerate(units)])
    twice = open_pruned(once, again)
    write_checkpoint(twice, tmp_path / "twice", beside=None, card="")
    heads_of = [[vars(own)["num_key_value_heads"] for own in of.config.per_layer_config] for of in (once, twice)]
    assert heads_of[0] == heads_of[1]


@pytest.mark.parametrize("plan_name", PLANS)
def test_dtype_rotary_tables_attention_implementation_and_tied_heads_are_kept(plan_name: str) -> None:
    dense = make_tiny().bfloat16().train()  # casts the rotary tables as well
    dense.set_attn_implementation("eager")
    pruned = cut(dense, PLANS[plan_name](dense))
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in pruned.buffers()} == {torch.float32}
    assert not pruned.training
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    assert all(m.config._attn_implementation == "eager" for m in pruned.modules() if hasattr(m, "config"))


def test_a_per_layer_granite_says_its_scale_under_the_name_that_serving_engines_read() -> None:
    model = make_tiny("granite")
    assert pruned_config(model.config, mixed_plan(model)).logit_scale == 1 / model.config.logits_scaling
    assert not hasattr(pruned_config(model.config, uniform_plan(model)), "logit_scale")


NOTHING: dict[Block, list[int]] = {Block.ATTENTION: [], Block.MLP: []}
# Family, layers of which it keeps something else than everything, words of the refusal.
UNFIT: list[tuple[str, dict[int, dict[Block, list[int]]], str]] = [
    ("llama", {0: {Block.ATTENTION: [0, 2], Block.MLP: FULL}}, r"keeps attention \[0, 2\].*0 to 1"),
    ("llama", {1: {Block.ATTENTION: [-1, 0], Block.MLP: FULL}}, "keeps attention"),
    ("llama", {2: {Block.ATTENTION: [1, 0], Block.MLP: FULL}}, "ascending"),
    ("llama", {3: {Block.ATTENTION: [0, 0], Block.MLP: FULL}}, "at most once"),
    ("llama", {0: {Block.ATTENTION: [0, 1], Block.MLP: [40]}}, r"keeps mlp \[40\].*0 to 39"),
    ("llama", dict.fromkeys(range(4), NOTHING), "removes all 4 layers"),
    ("llama", dict.fromkeys(range(5), NOTHING), "lists 5 layers"),
    ("lfm2", {0: {Block.ATTENTION: [0], Block.MLP: [0]}}, "layer 0 lists attention, mlp, the model's has mixer, mlp"),
    ("lfm2", {0: {Block.MIXER: [], Block.MLP: [0]}}, "layer 0 keeps a part without its mixer"),
    ("lfm2", {0: {Block.MIXER: [1], Block.MLP: [0]}}, r"keeps mixer \[1\].*0 to 0"),
    ("lfm2", {1: NOTHING, 3: NOTHING}, r"every layer with attention \(\[1, 3\]\)"),
]


@pytest.mark.parametrize(("family", "changed", "message"), UNFIT)
def test_plan_that_does_not_fit_is_refused(
    family: str, changed: dict[int, dict[Block, list[int]]], message: str
) -> None:
    model = make_tiny(family)
    units = {view.index: view.all_units for view in layer_structures(model)} | changed
    plan = tiny_plan(model, [], layers=[LayerPlan(*pair) for pair in units.items()])
    with pytest.raises(UserError, match=f"^--plan: .*{message}"):
        check_plan(layer_structures(model), plan, model.config)


def test_dense_model_and_its_config_are_not_touched() -> None:
    dense = make_tiny("qwen2")
    config, before = dense.config, dense.config.to_dict()
    weights = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    pruned = cut(dense, mixed_plan(dense))
    assert config.to_dict() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in dense.state_dict().items())
    assert pruned.config.rope_parameters is not config.rope_parameters
