"""H-GSP against a naive float64 reference, and the rules that make it well defined."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_prune.methods import HGSP
from lightning_prune.methods.hgsp import collapse, depth_prior, final_scores, gate_threshold, normalised
from lightning_prune.methods.scores import group_scores
from lightning_prune.models.families import layer_structures
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from tests.methods.running import mean_token_loss, projections, pruned_by, reference_groups, run_method, save_base
from tests.tiny import make_tiny, tiny_tokens

SHAPES = {
    "llama-gqa": {"family": "llama", "heads": 4, "kv_heads": 2},
    "qwen2-biases": {"family": "qwen2", "heads": 4, "kv_heads": 2},
    "llama-mha": {"family": "llama", "heads": 4, "kv_heads": 4},
    "llama-mqa": {"family": "llama", "heads": 4, "kv_heads": 1},
}


def reference_importance(model, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Σ |w·g| with autograd through the whole model in float64."""
    model = copy.deepcopy(model).double()
    mean_token_loss(model, tokens).backward()
    scores = [
        {name: (linear.weight * linear.weight.grad).detach().abs() for name, linear in projections(model, i).items()}
        for i in range(len(model.model.layers))
    ]
    return [reference_groups(model, i, score) for i, score in enumerate(scores)]


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


@pytest.mark.parametrize("shape", SHAPES)
def test_taylor_importance_and_selection_equal_a_float64_reference(shape: str, tmp_path: Path) -> None:
    model = make_tiny(**SHAPES[shape])
    tokens = tiny_tokens(7, 12)
    base = save_base(model, tmp_path / "base")
    method = run_method(HGSP(base, 0.3, temperature=0.7), tokens, tmp_path / "run", batch_size=3)

    expected = reference_importance(model, tokens)
    for layer, (groups, channels) in enumerate(expected):
        got = torch.from_numpy(method.scores.importance)
        torch.testing.assert_close(got[method.scores.of(layer, "attention")], groups, rtol=1e-4, atol=0)
        torch.testing.assert_close(got[method.scores.of(layer, "mlp")], channels, rtol=1e-4, atol=0)

    delta = reference_priors(model, tokens)
    torch.testing.assert_close(method.priors, delta, rtol=1e-3, atol=2e-6)
    assert expected_pruned(model, expected, delta, 0.3, 0.7) == {
        (int(layer), int(block), int(unit))
        for layer, block, unit, gone in zip(
            method.scores.layer, method.scores.code, method.scores.unit, method.scores.pruned, strict=True
        )
        if gone
    }


def expected_pruned(model, importance, delta: Tensor, ratio: float, temperature: float) -> set[tuple[int, int, int]]:
    """The ranking and the stop rule, written out with plain sorting."""
    views = layer_structures(model)
    tau = sorted(delta[0].tolist())
    position = 0.25 * (len(tau) - 1)
    low = math.floor(position)
    threshold = tau[low] + (position - low) * (tau[min(low + 1, len(tau) - 1)] - tau[low])
    rows = []
    for layer, blocks in enumerate(importance):
        for block, (values, cost) in enumerate(
            zip(blocks, (views[layer].unit_cost(Block.ATTENTION), views[layer].unit_cost(Block.MLP)), strict=True)
        ):
            effect = delta[0, layer] if delta[0, layer] < threshold else delta[1 + block, layer]
            prior = math.log(1 + max(float(effect), 0.0)) ** temperature
            rows += [
                (float(value) / cost * prior, float(value) / cost, layer, block, unit, cost)
                for unit, value in enumerate(values)
            ]
    total = sum(parameter.numel() for parameter in model.parameters())
    left = {(layer, block): len(importance[layer][block]) for layer in range(len(views)) for block in (0, 1)}
    removed, spent = set(), 0
    for _, _, layer, block, unit, cost in sorted(rows):
        view = views[layer]
        whole = (view.attention, *view.attention_norms) if block == 0 else (view.mlp, *view.mlp_norms)
        units = len(importance[layer][block]) * cost
        rest = sum(p.numel() for module in whole for p in module.parameters()) - units
        price = cost + (rest if left[layer, block] == 1 else 0)
        if spent + price > ratio * total:
            break
        spent += price
        left[layer, block] -= 1
        removed.add((layer, block, unit))
    return removed


def test_gradient_is_of_the_token_mean_even_with_a_short_last_batch(tmp_path: Path) -> None:
    base = save_base(make_tiny(), tmp_path / "base")
    tokens = tiny_tokens(14, 8)
    runs = [
        run_method(HGSP(base, 0.2, temperature=0), tokens, tmp_path / str(size), batch_size=size) for size in (1, 4, 14)
    ]
    for other in runs[1:]:
        torch.testing.assert_close(other.scores.importance, runs[0].scores.importance, rtol=1e-4, atol=0)
        assert other.plan.layers == runs[0].plan.layers


def test_temperature_zero_computes_no_prior_and_equals_the_base_score(tmp_path: Path, monkeypatch) -> None:
    def explode(*args: object, **kwargs: object) -> None:
        raise AssertionError("a prior was measured")

    monkeypatch.setattr("lightning_prune.methods.hgsp.RemovalPass", explode)
    base = save_base(make_tiny(), tmp_path / "base")
    method = run_method(HGSP(base, 0.2, importance="wanda", temperature=0), tiny_tokens(4, 8), tmp_path / "run")
    assert method.priors is None
    assert [current.name for current, _ in method.driver.loop.steps] == ["importance"] * 4
    assert np.array_equal(method.scores.score, method.scores.importance / method.scores.cost)


def test_prior_reads_only_its_prefix_of_the_shared_set_at_any_batch_size(tmp_path: Path) -> None:
    model = make_tiny()
    base = save_base(model, tmp_path / "base")
    tokens = tiny_tokens(8, 8)
    expected = reference_priors(model, tokens[:5])
    for size in (1, 2, 3, 8):
        method = run_method(
            HGSP(base, 0.2, importance="magnitude", prior_num_samples=5), tokens, tmp_path / str(size), batch_size=size
        )
        torch.testing.assert_close(method.priors, expected, rtol=1e-3, atol=2e-6)


def test_tau_infinity_measures_no_blocks(tmp_path: Path) -> None:
    base = save_base(make_tiny(), tmp_path / "base")
    method = run_method(HGSP(base, 0.2, importance="magnitude", tau=math.inf), tiny_tokens(4, 8), tmp_path / "run")
    layers = 4
    batches = 1
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


def test_default_gate_is_the_interpolated_first_quartile() -> None:
    assert gate_threshold(torch.tensor([4.0, 1.0, 2.0, 3.0]), None) == pytest.approx(1.75)
    assert gate_threshold(torch.tensor([4.0, 1.0]), 0.5) == 0.5


def test_units_with_zero_prior_go_first_in_the_order_of_their_base_score(tmp_path: Path) -> None:
    model = make_tiny(layers=2)
    views = layer_structures(model)
    generator = torch.Generator().manual_seed(3)
    attention = [torch.rand(2, generator=generator) for _ in views]
    mlp = [torch.rand(40, generator=generator) for _ in views]
    delta = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)  # layer 0's MLP helps when gone
    scores = final_scores(group_scores(views, attention, mlp), delta, 0.0, 1.0, "none")
    method = HGSP(importance="magnitude", pruning_ratio=0.05)
    gone = method.select(scores, views, sum(p.numel() for p in model.parameters()))
    rows = scores.of(0, "mlp")
    assert bool(gone[rows].any())
    assert not bool(gone[~rows].any())
    lowest = set(scores.base[rows].argsort()[: int(gone.sum())].tolist())
    assert set(scores.unit[gone].tolist()) == lowest


def test_collapse_removes_nearly_empty_layers_but_never_frozen_ones_or_the_last() -> None:
    views = layer_structures(make_tiny(layers=3))
    scores = group_scores(views, [torch.ones(2)] * 3, [torch.ones(40)] * 3)
    pruned = np.zeros(len(scores.layer), dtype=bool)
    for layer in range(3):  # one group and 36 of 40 channels gone: ½(1/2 + 1/10) = 0.3 kept
        pruned |= scores.of(layer, "attention") & (scores.unit == 0)
        pruned |= scores.of(layer, "mlp") & (scores.unit < 36)
    assert np.array_equal(collapse(scores, pruned, 0.0, set()), pruned)
    assert np.array_equal(collapse(scores, pruned, 0.3, set()), pruned)  # strictly below
    some = collapse(scores, pruned, 0.31, {1})
    assert [bool(some[scores.layer == layer].all()) for layer in range(3)] == [True, False, True]
    everything = collapse(scores, pruned, 0.31, set())
    assert [bool(everything[scores.layer == layer].all()) for layer in range(3)] == [True, True, False]


def test_score_norm_makes_kinds_or_blocks_comparable() -> None:
    views = layer_structures(make_tiny(layers=2))
    scores = group_scores(views, [torch.tensor([1.0, 3.0])] * 2, [torch.arange(1.0, 41.0)] * 2)
    kind = normalised(scores, "kind")
    assert kind[scores.of_kind(Block.MLP)].median() == pytest.approx(1.0)
    block = normalised(scores, "block")
    for layer in range(2):
        for name in ("attention", "mlp"):
            assert float(block[scores.of(layer, name)].mean()) == pytest.approx(1.0)
    assert np.array_equal(normalised(scores, "none"), scores.importance / scores.cost)


def test_frozen_layers_are_measured_but_never_pruned(tmp_path: Path) -> None:
    base = save_base(make_tiny(layers=4), tmp_path / "base")
    tokens = tiny_tokens(4, 8)
    free = run_method(HGSP(base, 0.2, importance="wanda"), tokens, tmp_path / "free")
    frozen = run_method(
        HGSP(base, 0.2, importance="wanda", freeze_first_n_layers=1, freeze_last_n_layers=1),
        tokens,
        tmp_path / "frozen",
    )
    assert np.array_equal(free.scores.score, frozen.scores.score)
    assert set(frozen.scores.layer[frozen.scores.pruned].tolist()) <= {1, 2}
    assert frozen.plan.achieved_ratio <= 0.2


def test_a_layer_that_loses_both_blocks_is_removed(tmp_path: Path) -> None:
    model = make_tiny(layers=4)
    with torch.no_grad():
        for linear in projections(model, 2).values():
            linear.weight.mul_(1e-4)  # worth nothing by any importance
    base = save_base(model, tmp_path / "base")
    method = run_method(HGSP(base, 0.25, importance="magnitude", temperature=0), tiny_tokens(4, 8), tmp_path / "run")
    assert method.plan.removed_layers == [2]
    assert pruned_by(method).config.num_hidden_layers == 3
    assert sum(p.numel() for p in pruned_by(method).parameters()) == method.plan.parameters["pruned"]
    assert method.plan.achieved_ratio <= 0.25


def test_overflowing_fp16_gradients_stop_with_the_layer_named(tmp_path: Path) -> None:
    model = make_tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(100)
        model.model.layers[1].self_attn.v_proj.weight.mul_(3e3)
        model.model.layers[1].self_attn.o_proj.weight.mul_(3e3)
    base = save_base(model, tmp_path / "base")
    with pytest.raises(FloatingPointError, match=r"layer \d, .*NaN or infinite"):
        run_method(HGSP(base, 0.2, temperature=0), tiny_tokens(4, 8), tmp_path / "run", precision="16-true")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"tau": -0.1}, "tau"),
        ({"collapse_epsilon": 1.0}, "collapse_epsilon"),
        ({"prior_num_samples": 0}, "prior_num_samples"),
    ],
)
def test_senseless_options_are_refused_by_name(options: dict[str, float], name: str) -> None:
    with pytest.raises(UserError, match=f"--model.{name}"):
        HGSP(**options)


def test_non_finite_priors_name_the_layer() -> None:
    views = layer_structures(make_tiny(layers=2))
    scores = group_scores(views, [torch.ones(2)] * 2, [torch.ones(40)] * 2)
    delta = torch.tensor([[1.0, math.nan]] * 3)
    with pytest.raises(FloatingPointError, match=r"layers \[1\]"):
        final_scores(scores, delta, 0.0, 1.0, "none")


def test_a_prior_whose_power_overflows_is_a_temperature_too_high() -> None:
    views = layer_structures(make_tiny(layers=2))
    scores = group_scores(views, [torch.ones(2)] * 2, [torch.ones(40)] * 2)
    delta = torch.tensor([[math.e**3 - 1, 0.5]] * 3, dtype=torch.float64)  # a prior of 3 and one below 1
    assert np.isfinite(final_scores(scores, delta, 0.0, 600.0, "none").score).all()  # 3^600 is 1.9e286
    for temperature in (700.0, 1e308):
        with pytest.raises(UserError, match=r"--model\.temperature: .* a prior of 3 to that power is not finite"):
            final_scores(scores, delta, 0.0, temperature, "none")
