"""ShortGPT: block influence per layer, and which layers go."""

import copy
from functools import partial
from typing import Any

import pytest
import torch

from lightning_prune.checkpoint.cut import layout_of
from lightning_prune.methods import ShortGPT
from lightning_prune.methods.shortgpt import nearest_layer_count
from tests.methods.running import pruned_by
from tests.tiny import make_tiny, tiny_tokens


def reference_influence(model, tokens: torch.Tensor) -> torch.Tensor:
    """1 − mean cosine per layer, token by token in float64; the streams come from hooks, before the final norm."""
    model, states, found = copy.deepcopy(model), [], []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, output: states.append((args[0].double(), output.double())))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for pair in states:
        before, after = (state.reshape(-1, state.shape[-1]) for state in pair)
        cosines = [float(a @ b / (a @ a).sqrt() / (b @ b).sqrt()) for a, b in zip(before, after, strict=True)]
        found.append(1 - sum(cosines) / len(cosines))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_influence_equals_the_reference_and_the_lowest_layers_go(family: str, run: Any) -> None:
    model = make_tiny(family, layers=5)
    tokens = tiny_tokens(7, 12)
    expected = reference_influence(model, tokens)
    for size in (3, 7):
        method = run(model, ShortGPT, batch_size=size, tokens=tokens, n_remove_layers=2)
        torch.testing.assert_close(torch.from_numpy(method.scores.importance), expected, rtol=1e-4, atol=1e-8)
        assert method.plan.removed_layers == sorted(sorted(range(5), key=lambda i: float(expected[i]))[:2])
    assert layout_of(pruned_by(method).config) == "stock"
    assert pruned_by(method).config.num_hidden_layers == 3
    assert sum(p.numel() for p in pruned_by(method).parameters()) == method.plan.parameters["pruned"]


def test_ties_go_to_the_lower_layer(run: Any) -> None:
    model = make_tiny(layers=4)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    method = run(model, partial(ShortGPT, n_remove_layers=2))
    assert method.scores.importance[1:].tolist() == [0.0] * 3
    assert method.plan.removed_layers == [1, 2]


def test_the_nearest_number_of_layers_or_at_most_the_budget() -> None:
    for budget, count in ((24, 2), (26, 3), (25, 2)):  # of two equally near ones the fewer
        assert nearest_layer_count([10] * 8, budget) == count
    for budget, count in ((9, 0), (10, 1), (19.9, 1), (29, 2), (80, 8), (1000, 8)):
        assert nearest_layer_count([10] * 8, budget, at_most=True) == count


def test_at_most_keeps_the_ratio_where_the_nearest_number_of_layers_exceeds_it(run: Any) -> None:
    model = make_tiny(layers=5)
    total, layer = (sum(one.numel() for one in part.parameters()) for part in (model, model.model.layers[0]))
    ratio = round(1.7 * layer / total, 4)
    for at_most, gone in ((False, 2), (True, 1)):
        method = run(model, ShortGPT, ratio, tiny_tokens(4, 8), at_most=at_most)
        assert len(method.plan.removed_layers) == gone
        assert (method.plan.achieved_ratio <= ratio) == at_most
        assert method.plan.pruning_ratio == ratio
