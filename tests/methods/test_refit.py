"""The refit after a selection, against explicit float64 least squares on whole forwards of both models."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lightning_prune.calibration.passes import Pass
from lightning_prune.calibration.statistics import gram
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.data.sampling import held_out_samples
from lightning_prune.methods import HGSP, Magnitude, ShortGPT, SlimGPT
from lightning_prune.methods.refit_math import (
    DAMPINGS,
    PROBES,
    NormalEquations,
    choose_damping,
    fit,
    lowest,
    ridge,
    squared_error,
)
from lightning_prune.models.vocabulary import Block
from tests.live_bytes import LiveBytes
from tests.methods.running import inputs_of, pruned_by
from tests.tiny import make_tiny, tiny_tokens

SAMPLES, LENGTH, DAMPING = 24, 16, 0.05


def residual_streams(model: PreTrainedModel, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Before every attention (and after the last layer), and with what attention adds: ``[tokens, D]`` each."""
    before: list[Tensor] = []
    middle: list[Tensor] = []
    handles = []
    for layer in model.model.layers:
        handles.append(layer.register_forward_pre_hook(lambda _, args: before.append(args[0].flatten(0, 1))))
        norm = getattr(layer, "pre_feedforward_layernorm", None) or getattr(layer, "post_attention_layernorm", None)
        if norm is None:  # side by side
            handles.append(
                layer.self_attn.register_forward_hook(
                    lambda _, args, out: middle.append(before[-1] + out[0].flatten(0, 1))
                )
            )
        else:
            handles.append(norm.register_forward_pre_hook(lambda _, args: middle.append(args[0].flatten(0, 1))))
    final = model.model.norm.register_forward_pre_hook(lambda _, args: before.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in (*handles, final):
        handle.remove()
    return before, middle


def solution(x: Tensor, y: Tensor, old: Tensor, damping: float) -> Tensor:
    """Ridge regression as ordinary least squares on stacked rows: no normal equations."""
    pull = (damping * x.square().sum(0)).sqrt()
    pull[pull == 0] = 1
    rows = torch.cat([x, pull.diag()])
    return torch.linalg.lstsq(rows, torch.cat([y, pull[:, None] * old.T])).solution.T


def reference(
    model: PreTrainedModel, tokens: Tensor, kept: list[LayerPlan], residual: bool, factor: float
) -> PreTrainedModel:
    """The dense model with zeroed and refitted projections, layer by layer, attention before the MLP."""
    dense = copy.deepcopy(model).double()
    pruned = copy.deepcopy(dense)
    held = held_out_samples(tokens).repeat_interleave(tokens.shape[1])
    stream_before, stream_middle = residual_streams(dense, tokens)
    for index, plan in enumerate(kept):
        layer = pruned.model.layers[index]
        after = next((other for other in range(index + 1, len(kept)) if not kept[other].removed), len(kept))
        for block in (block for block in plan.kept if block is not Block.MIXER):
            linear = layer.self_attn.o_proj if block == "attention" else layer.mlp.down_proj
            units = plan.kept[Block.ATTENTION] if block == "attention" else plan.kept[Block.MLP]
            width = linear.in_features // model.config.num_key_value_heads if block == "attention" else 1
            columns = [unit * width + j for unit in units for j in range(width)]
            x = inputs_of(pruned, linear, tokens)
            own = x @ linear.weight.data.T
            if residual:
                goal = stream_middle[index] if block == "attention" else stream_before[after]
                before, middle = residual_streams(pruned, tokens)
                y = (goal - (before[index] if block == "attention" else middle[index])) / factor
            else:
                y = own
            if residual and linear.bias is not None:
                y = y - linear.bias.data
            x, old = x[:, columns], linear.weight.data[:, columns]
            new = old
            if columns:
                tried = solution(x[~held], y[~held], old, DAMPING)
                if (x[held] @ tried.T - y[held]).norm() < (x[held] @ old.T - y[held]).norm():
                    new = solution(x, y, old, DAMPING)
            linear.weight.data = torch.zeros_like(linear.weight.data)
            linear.weight.data[:, columns] = new
            if not columns and linear.bias is not None:
                linear.bias.data.zero_()
    return pruned


def assert_same_logits(method: Any, expected: PreTrainedModel, tokens: Tensor) -> None:
    """The checkpoint is fp32, so the outputs agree to its rounding; the solution itself is tested below."""
    with torch.no_grad():
        got, want = (
            model(input_ids=tokens, use_cache=False).logits.double() for model in (pruned_by(method), expected)
        )
    assert close(got, want) < 1e-5


def close(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("family", "target", "as_residual", "factor"),
    [
        ("llama", "residual", True, 1.0),
        ("llama", "output", False, 1.0),
        ("seed_oss", "residual", True, 1.0),  # o has a bias
        ("granite", "residual", True, 0.4),  # blocks are multiplied before they are added
        ("cohere", "residual", True, 1.0),  # attention beside the MLP
        ("gemma2", "residual", False, 1.0),  # a norm follows the block: output takes its place
    ],
)
def test_whole_run_equals_least_squares_in_float64(
    family: str, target: str, as_residual: bool, factor: float, run: Any
) -> None:
    extra = {"attention_out_bias": True} if family == "seed_oss" else {}
    model = make_tiny(family, layers=3, **extra)
    tokens = tiny_tokens(SAMPLES, LENGTH)
    options = {"refit": target, "refit_damping": DAMPING, "temperature": 0}
    method = run(model, HGSP, 0.25, tokens, precision="64-true", **options)
    expected = reference(model, tokens, method.plan.layers, as_residual, factor)
    fits = method.details()["refit"]["fits"]
    assert {fit["target"] for fit in fits} == {"residual" if as_residual else "output"}
    assert any(fit["damping"] for fit in fits)
    assert_same_logits(method, expected, tokens)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_before_removed_layers_the_refit_aims_at_what_comes_after_them(count: int, run: Any) -> None:
    model, tokens = make_tiny(layers=5), tiny_tokens(SAMPLES, LENGTH)
    options = {"refit": "residual", "refit_damping": DAMPING, "n_remove_layers": count}
    method = run(model, ShortGPT, 0.3, tokens, precision="64-true", **options)
    removed = [layer.removed for layer in method.plan.layers]
    assert (False, True) in pairwise(removed)
    expected = reference(model, tokens, method.plan.layers, True, 1.0)
    assert any(fit["damping"] for fit in method.details()["refit"]["fits"])
    assert_same_logits(method, expected, tokens)


@pytest.mark.parametrize("known", [None, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ridge_equals_least_squares_on_stacked_rows(known: float | None, dtype: torch.dtype) -> None:
    """Products of fp32 activations are exact enough for every damping."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4000, 60, generator=generator, dtype=dtype) * torch.logspace(-2, 3, 60, dtype=dtype)
    x[:, 7] = 1.001 * x[:, 6] + 1e-3 * x[:, 7]  # nearly dependent
    x[:, 9] = 0  # never moves
    y = x @ torch.randn(60, 9, generator=generator, dtype=dtype) + torch.randn(4000, 9, generator=generator)
    old = torch.randn(9, 60, generator=generator, dtype=dtype)
    equations = NormalEquations.zeros(60, 9, torch.float64, torch.device("cpu"), known)
    for rows in torch.arange(4000).split(500):
        equations.add(x[rows], y[rows])
    equations.complete()
    for damping in (1e-3, 1.0):
        found, want = ridge(equations, old, damping), solution(x.double(), y.double(), old.double(), damping)
        assert close(x.double() @ found.T, x.double() @ want.T) < 1e-5
        torch.testing.assert_close(found[:, 9], old[:, 9].double())
        least = float((x.double() @ want.T - y).square().sum())
        assert float(squared_error(x.double(), y, found)) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize(
    ("errors", "tried"),
    [
        ([5, 4, 3, 2, 3, 4, 5], {2, 3, 4}),
        ([1, 2, 3, 4, 5, 6, 7], {0, 1, 2, 3}),
        ([7, 6, 5, 4, 3, 2, 1], {2, 3, 4, 5, 6}),
        ([4, 1, 2, 3, 4, 5, 6], {0, 1, 2, 3}),
    ],
)
def test_the_damping_is_searched_downhill(errors: list[float], tried: set[int]) -> None:
    seen: set[float] = set()
    best = lowest(lambda candidate: (seen.add(candidate), errors[int(candidate)])[1], range(7))  # type: ignore[func-returns-value]
    assert errors[int(best)] == min(errors)
    assert seen == tried


def test_ridge_says_what_is_wrong_with_its_sums() -> None:
    equations = NormalEquations.zeros(3, 2, torch.float64, torch.device("cpu"))
    equations.gram += 1  # of no inputs at all: larger beside its diagonal than on it
    equations.gram[0, 1] = equations.gram[1, 0] = 2
    with pytest.raises(FloatingPointError, match="not positive definite"):
        ridge(equations, torch.ones(2, 3), 0.1)
    equations.gram[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        ridge(equations, torch.ones(2, 3), 0.1)


# Refits after methods that ``test_every_method.py`` runs without one.
@pytest.mark.parametrize("make", [Magnitude, ShortGPT, SlimGPT])
def test_batch_size_and_sample_order_do_not_change_the_result(make: Any, run: Any) -> None:
    model, tokens = make_tiny(layers=3), tiny_tokens(SAMPLES, LENGTH)
    first = run(model, make, 0.25, tokens, refit="residual")
    other = run(model, make, 0.25, tokens.flip(0), batch_size=5, refit="residual")
    assert first.plan.weights_updated
    assert other.plan.layers == first.plan.layers
    weights, found = (load_file(method.pruned_folder / "model.safetensors") for method in (first, other))
    for key, weight in weights.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-3, atol=1e-4)
    dampings = [[fit["damping"] for fit in method.details()["refit"]["fits"]] for method in (first, other)]
    assert dampings[0] == dampings[1]


@pytest.mark.parametrize("importance", ["taylor", "kfac"])
def test_the_dense_stream_that_a_pass_kept_spares_the_dense_mlps(importance: str, run: Any) -> None:
    layers, batches = 4, 4

    class Again(HGSP):
        def refit_passes(self, kept: list[LayerPlan], held_out: Any) -> list[Pass]:
            self.dense_stream = None
            return super().refit_passes(kept, held_out)

    runs = {}
    for kind in (HGSP, Again):
        options = {"importance": importance, "refit": "residual", "temperature": 0}
        method = run(make_tiny(layers=layers), kind, 0.25, tiny_tokens(4 * batches, LENGTH), **options)
        written = (method.pruned_folder / "model.safetensors").read_bytes()
        runs[kind] = written, method.driver.setting.model.evaluations
    assert runs[HGSP][0] == runs[Again][0]
    assert runs[Again][1] - runs[HGSP][1] == (layers - 1) * batches  # the stream after the last layer was not kept


def test_what_does_not_help_on_held_out_samples_is_left_out(run: Any) -> None:
    """Eight samples of four tokens cannot determine 40 columns: with hardly any damping the fit is all noise."""
    options = {"refit": "residual", "refit_damping": 1e-9, "temperature": 0}
    method = run(make_tiny(layers=2), HGSP, 0.2, tiny_tokens(8, 4), **options)
    fits = method.details()["refit"]["fits"]
    left_out = [fit for fit in fits if fit["damping"] is None]
    assert left_out
    assert all(fit["held_out_error"]["after"] == fit["held_out_error"]["before"] for fit in left_out)
    assert all(fit["held_out_error"]["after"] <= fit["held_out_error"]["before"] for fit in fits)


def test_an_eighth_is_held_out_whatever_the_order() -> None:
    tokens = tiny_tokens(24, 6)
    chosen = held_out_samples(tokens)
    assert int(chosen.sum()) == 3
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(held_out_samples(tokens[order]), chosen[order])
    assert not held_out_samples(tokens[:7]).any()


@pytest.mark.parametrize(("noise", "likely"), [(0.01, {1e-3}), (0.3, {3e-3, 1e-2, 3e-2, 1e-1}), (30.0, {1.0})])
def test_the_damping_for_some_outputs_in_fp32_is_that_for_all_in_float64(noise: float, likely: set[float]) -> None:
    generator = torch.Generator().manual_seed(6)
    inputs, held = 60, 300
    x = torch.randn(150 + held, inputs, generator=generator) * torch.logspace(-2, 3, inputs)
    x[:, 7] = 1.001 * x[:, 6] + 1e-3 * x[:, 7]  # nearly dependent
    old = torch.randn(4 * PROBES, inputs, generator=generator) / torch.logspace(-2, 3, inputs)
    right = old + 0.1 * torch.randn(old.shape, generator=generator) / torch.logspace(-2, 3, inputs)
    y = x @ right.T + noise * torch.randn(len(x), len(old), generator=generator)
    equations = NormalEquations.zeros(inputs, len(old), torch.float64, torch.device("cpu"))
    equations.add(x[held:], y[held:])
    equations.complete()
    rest = equations.cross - old.double() @ equations.gram
    found = choose_damping(equations, old.double(), rest, x[:held], y[:held])
    x, y, old = x.double(), y.double(), old.double()
    errors = {
        damping: float((y[:held] - x[:held] @ solution(x[held:], y[held:], old, damping).T).square().sum())
        for damping in DAMPINGS
    }
    assert found in likely
    assert errors[found] <= 1.001 * min(errors.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_fit_holds_two_matrices_beside_its_sums(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """``equation_bytes`` counts one more, the copy of the factor that a solve makes, and the sums' own."""
    monkeypatch.setattr(gram, "MIRROR_BLOCK", 64)
    n, d, tokens = 700, 8, 2000
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, n, generator=generator, dtype=dtype) for rows in (tokens, d))
    y = x @ weight.T
    equations = NormalEquations.zeros(n, d, dtype, x.device)
    equations.add(x[:-200], y[:-200])
    old = torch.zeros(d, n, dtype=dtype)
    with LiveBytes() as fitting:
        found = fit(equations, old, [(x[-200:], y[-200:])], None)
    assert found.damping > 0
    samples = 200 * (n + d) * dtype.itemsize
    assert fitting.peak < 2.1 * n * n * dtype.itemsize + samples
