"""A decision laid over the dense model computes what the cut model computes."""

import pytest
import torch

from lightning_prune.checkpoint.in_memory_plan import InMemoryPlan
from lightning_prune.models.families import layer_structures
from tests.cutting import cut, layered
from tests.tiny import CUTTABLE, HYBRIDS, SIDE_BY_SIDE, make_tiny, mixed_plan, tiny_tokens


@pytest.mark.parametrize("family", [*CUTTABLE, *HYBRIDS, *SIDE_BY_SIDE])
def test_logits_are_those_of_the_cut_model(family: str) -> None:
    model = make_tiny(family)
    plan, tokens = mixed_plan(model), tiny_tokens()
    generator = torch.Generator().manual_seed(2)
    shape = layer_structures(model)[1].linears["down"].weight.shape
    new = {1: {"down": torch.randn(shape, generator=generator)}}
    with torch.no_grad():
        expected = cut(model, plan, lambda layer: new.get(layer, {}))(input_ids=tokens, use_cache=False).logits
        over = layered(model)
        over.change_layers(InMemoryPlan(plan.layers, lambda layer: new.get(layer, {})))
        torch.testing.assert_close(over.logits(tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("onload", ["layer", "model"])
def test_what_is_laid_over_the_model_can_be_taken_off(onload) -> None:
    model = make_tiny()
    over = layered(model, onload=onload)
    dense = over.enter(0).mlp.down_proj.weight.clone()
    over.change_layers(InMemoryPlan(mixed_plan(model).layers, lambda layer: {}))
    assert not over.is_present(0)
    assert not torch.equal(over.enter(1).mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight)
    over.change_layers(None)
    assert torch.equal(over.enter(0).mlp.down_proj.weight, dense)
    assert torch.equal(over.enter(1).mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight)


@torch.no_grad()
def test_biases_that_the_dense_model_lacks_come_and_go_with_it() -> None:
    model, tokens = make_tiny(), tiny_tokens()
    plan = mixed_plan(model, biases=["attention_bias", "mlp_bias"])
    generator = torch.Generator().manual_seed(3)
    new = {1: {f"{role}.bias": torch.randn(32, generator=generator) for role in ("output", "down")}}
    expected = cut(model, plan, lambda layer: new.get(layer, {}))(input_ids=tokens, use_cache=False).logits
    without = cut(model, mixed_plan(model))(input_ids=tokens, use_cache=False).logits
    assert not torch.allclose(expected, without, atol=1e-2)
    over = layered(model, onload="model")
    over.change_layers(InMemoryPlan(plan.layers, lambda layer: new.get(layer, {})))
    torch.testing.assert_close(over.logits(tokens), expected, rtol=1e-4, atol=1e-4)
    over.change_layers(None)
    assert over.enter(1).mlp.down_proj.bias is None
    assert over.layers[1].self_attn.o_proj.bias is None
