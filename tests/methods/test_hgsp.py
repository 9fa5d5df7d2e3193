"""H-GSP against a naive float64 reference, and the rules that make it well defined."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_prune.methods import HGSP
from lightning_prune.methods.hgsp import collapse, depth_prior, final_scores, normalised
from lightning_prune.methods.scores import group_scores
from lightning_prune.models.families import layer_structures
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from tests.methods import reference
from tests.methods.running import mean_token_loss, projections, pruned_by
from tests.tiny import make_tiny, tiny_tokens

TWO_LAYERS = layer_structures(make_tiny(layers=2))


def scored(attention: Tensor, mlp: Tensor) -> Any:
    """The same importances in both layers."""
    return group_scores(TWO_LAYERS, [{Block.ATTENTION: attention, Block.MLP: mlp}] * 2)


def reference_priors(model, tokens: Tensor) -> Tensor:
    """3L + 1 whole forwards in float64, one piece stubbed out at a time."""
    model = copy.deepcopy(model).double()
    dense = mean_token_loss(model, tokens)
    found = torch.zeros(3, len(model.model.layers), dtype=torch.float64)
    for i, layer in enumerate(model.model.layers):
        for piece, module, stub in (
            (0, layer, lambda hidden_states, *args, **kwargs: hidden_states),
            (1, layer.self_attn, lambda hidden_states, *args, **kwargs: (torch.zeros_like(hidden_states), None)),
            (2, layer.mlp, lambda hidden_states: torch.zeros_like(hidden_states)),
        ):
            module.forward = stub
            found[piece, i] = mean_token_loss(model, tokens) - dense
            del module.forward
    return found.detach()


@pytest.mark.parametrize("shape", [{"family": "qwen2"}, {"kv_heads": 1}], ids=["qwen2-biases", "llama-mqa"])
def test_priors_and_selection_equal_a_float64_reference(shape: dict[str, Any], run: Any) -> None:
    model, tokens = make_tiny(**shape), tiny_tokens(7, 12)
    method = run(model, HGSP, 0.3, tokens, batch_size=3, temperature=0.7)
    delta = reference_priors(model, tokens)
    torch.testing.assert_close(method.priors, delta, rtol=1e-3, atol=2e-6)
    # The gate is the first quartile, between the two values beside it.
    low, high = sorted(delta[0].tolist())[:2]
    gate = low + 0.75 * (high - low)

    def prior(layer: int, block: int) -> float:
        effect = delta[0, layer] if delta[0, layer] < gate else delta[1 + block, layer]
        return math.log(1 + max(float(effect), 0.0)) ** 0.7

    exact = copy.deepcopy(model).double()
    rows = reference.group_rows(exact, reference.slopes(exact, tokens))
    rows = [replace(row, score=row.base * prior(row.layer, row.block)) for row in rows]
    budget = int(0.3 * sum(parameter.numel() for parameter in model.parameters()))
    expected = reference.prefix(rows, set(rows), budget, reference.block_extras(model), round_to=1)
    assert {row for row in rows if method.scores.pruned[row.place]} == expected


def test_temperature_zero_computes_no_prior_and_equals_the_base_score(run: Any, monkeypatch) -> None:
    def explode(*args: object, **kwargs: object) -> None:
        raise AssertionError("a prior was measured")

    monkeypatch.setattr("lightning_prune.methods.hgsp.RemovalPass", explode)
    method = run(make_tiny(), HGSP, 0.2, tiny_tokens(4, 8), importance="wanda", temperature=0)
    assert method.priors is None
    assert [current.name for current, _ in method.driver.loop.steps] == ["importance"] * 4
    assert np.array_equal(method.scores.score, method.scores.importance / method.scores.cost)


def test_prior_reads_only_its_prefix_of_the_shared_set(run: Any) -> None:
    model, tokens = make_tiny(), tiny_tokens(8, 8)
    method = run(model, HGSP, 0.2, tokens, batch_size=3, importance="magnitude", prior_num_samples=5)
    torch.testing.assert_close(method.priors, reference_priors(model, tokens[:5]), rtol=1e-3, atol=2e-6)


def test_tau_infinity_measures_no_blocks(run: Any) -> None:
    method = run(make_tiny(), HGSP, 0.2, tiny_tokens(4, 8), importance="magnitude", tau=math.inf)
    layers, batches = 4, 1
    assert method.driver.loop.setting.model.evaluations == batches * (layers + layers * (layers - 1) // 2)
    for layer in range(layers):
        rows = method.scores.layer == layer
        assert len(set(method.scores.prior[rows].tolist())) == 1


def test_depth_prior_rules() -> None:
    delta = torch.tensor([[0.1, 0.5, -0.2], [0.3, 0.7, -0.1], [0.2, -0.4, 0.6]], dtype=torch.float64)
    # gate at 0.3: layers 0 and 2 as a whole, layer 1 by block; negative effects count as zero
    expected = torch.tensor([[math.log(1.1), math.log(1.7), 0.0], [math.log(1.1), 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(depth_prior(delta, 0.3), expected)
    # 0 means block-wise for every layer, the one with a negative effect too
    blockwise = torch.tensor([[math.log(1.3), math.log(1.7), 0.0], [math.log(1.2), 0.0, math.log(1.6)]])
    torch.testing.assert_close(depth_prior(delta, 0.0), blockwise.double())
    layerwise = torch.tensor([math.log(1.1), math.log(1.5), 0.0], dtype=torch.float64)
    torch.testing.assert_close(depth_prior(delta, math.inf), layerwise.expand(2, 3))


def test_units_with_zero_prior_go_first_in_the_order_of_their_base_score() -> None:
    generator = torch.Generator().manual_seed(3)
    attention, mlp = (torch.rand(units, generator=generator) for units in (2, 40))
    delta = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)  # layer 0's MLP helps when gone
    scores = final_scores(scored(attention, mlp), delta, 0.0, 1.0, "none")
    gone = HGSP(importance="magnitude", pruning_ratio=0.05).select(scores, TWO_LAYERS, 20_000)
    rows = scores.of(0, "mlp")
    assert bool(gone[rows].any())
    assert not bool(gone[~rows].any())
    lowest = set(scores.base[rows].argsort()[: int(gone.sum())].tolist())
    assert set(scores.unit[gone].tolist()) == lowest


def test_collapse_removes_nearly_empty_layers_but_never_frozen_ones_or_the_last() -> None:
    views = layer_structures(make_tiny(layers=3))
    scores = group_scores(views)
    pruned = np.zeros(len(scores.layer), dtype=bool)
    for layer in range(3):  # one group and 36 of 40 channels gone: ½(1/2 + 1/10) = 0.3 kept
        pruned |= scores.of(layer, "attention") & (scores.unit == 0)
        pruned |= scores.of(layer, "mlp") & (scores.unit < 36)
    scores = replace(scores, pruned=pruned)
    assert np.array_equal(collapse(scores, 0.0, set()), pruned)
    assert np.array_equal(collapse(scores, 0.3, set()), pruned)  # strictly below
    some = collapse(scores, 0.31, {1})
    assert [bool(some[scores.layer == layer].all()) for layer in range(3)] == [True, False, True]
    everything = collapse(scores, 0.31, set())
    assert [bool(everything[scores.layer == layer].all()) for layer in range(3)] == [True, True, False]


def test_score_norm_makes_kinds_or_blocks_comparable() -> None:
    scores = scored(torch.tensor([1.0, 3.0]), torch.arange(1.0, 41.0))
    kind = normalised(scores, "kind")
    assert kind[scores.of_kind(Block.MLP)].median() == pytest.approx(1.0)
    block = normalised(scores, "block")
    for layer in range(2):
        for name in ("attention", "mlp"):
            assert float(block[scores.of(layer, name)].mean()) == pytest.approx(1.0)
    assert np.array_equal(normalised(scores, "none"), scores.importance / scores.cost)


def test_a_layer_that_loses_both_blocks_is_removed(run: Any) -> None:
    model = make_tiny(layers=4)
    with torch.no_grad():
        for linear in projections(model, 2).values():
            linear.weight.mul_(1e-4)  # worth nothing by any importance
    method = run(model, HGSP, 0.25, tiny_tokens(4, 8), importance="magnitude", temperature=0)
    assert method.plan.removed_layers == [2]
    assert pruned_by(method).config.num_hidden_layers == 3
    assert sum(p.numel() for p in pruned_by(method).parameters()) == method.plan.parameters["pruned"]
    assert method.plan.achieved_ratio <= 0.25


def test_a_prior_or_its_power_that_is_not_finite_is_refused_by_layer_or_temperature() -> None:
    scores = group_scores(TWO_LAYERS)
    with pytest.raises(FloatingPointError, match=r"layers \[1\]"):
        final_scores(scores, torch.tensor([[1.0, math.nan]] * 3), 0.0, 1.0, "none")
    delta = torch.tensor([[math.e**3 - 1, 0.5]] * 3, dtype=torch.float64)  # a prior of 3 and one below 1
    assert np.isfinite(final_scores(scores, delta, 0.0, 600.0, "none").score).all()  # 3^600 is 1.9e286
    for temperature in (700.0, 1e308):
        with pytest.raises(UserError, match=r"--model\.temperature: .* a prior of 3 to that power is not finite"):
            final_scores(scores, delta, 0.0, temperature, "none")
