"""What a model takes in use, against the model itself."""

from typing import Any

import pytest

from lightning_prune.checkpoint.cut import unpruned
from lightning_prune.checkpoint.expert_plans import parameter_counts
from lightning_prune.evaluation.efficiency import kv_cache_bytes_per_token, macs_per_token
from lightning_prune.methods.footprint import footprint
from lightning_prune.models.families import layer_structures
from tests.tiny import make_moe, make_tiny


@pytest.mark.parametrize(
    ("make", "options"), [(make_tiny, {"tied": True}), (make_tiny, {"tied": False}), (make_moe, {"layers": 2})]
)
def test_memory_and_work_are_those_of_the_model(make: Any, options: dict[str, Any]) -> None:
    model = make(**options)
    layers, total = layer_structures(model), sum(one.numel() for one in model.parameters())
    sizes = parameter_counts(layers, total, unpruned(layers), total)
    active = sizes.get("pruned_active", total)
    found = footprint(layers, model.config, unpruned(layers), (total, active), 4)
    assert found["memory_bytes"] == {128: 4 * total + 128 * kv_cache_bytes_per_token(model)}  # it has 128 positions
    weights = macs_per_token(model, 0)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            weights += layer.mlp.gate.weight.numel() + 2 * sum(one[0].numel() for one in layer.mlp.experts.parameters())
    vectors = sum(one.numel() for one in model.parameters() if one.dim() == 1)
    assert found["flops_per_token"] == 2 * (weights + vectors)
