"""Importances and priors that come from gradients, against autograd through the whole model in float64."""

import copy
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_prune.methods import HGSP, kfac, slimgpt_math
from lightning_prune.methods.kfac import DAMPING, ROUNDS, compensated_costs, inverse_moment
from tests.methods.running import mean_token_loss, projections
from tests.tiny import make_tiny, tiny_tokens

OUTPUTS = ("o_proj", "down_proj")


def differentiate(model: PreTrainedModel, tokens: Tensor) -> None:
    """Backward of the loss summed over tokens."""
    (mean_token_loss(model, tokens) * tokens[:, 1:].numel()).backward()


def units_of(model: PreTrainedModel) -> tuple[int, int]:
    return model.config.num_key_value_heads, model.config.intermediate_size


def assert_importances(method: Any, layer: int, expected: Any, rtol: float) -> None:
    """``expected``: of groups and of channels."""
    for block, values in zip(("attention", "mlp"), expected, strict=True):
        found = torch.from_numpy(method.scores.importance[method.scores.of(layer, block)])
        torch.testing.assert_close(found, torch.as_tensor(values, dtype=torch.float64), rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_fisher_is_the_mean_square_of_the_slopes_of_masks(family: str, run: Any) -> None:
    """Masks per sample, token and unit take gradients."""
    model, tokens = make_tiny(family, layers=3), tiny_tokens(7, 12)
    method = run(model, HGSP, 0.2, tokens, batch_size=3, importance="fisher", temperature=0)
    exact = copy.deepcopy(model).double()

    def hook(linear: torch.nn.Linear, units: int) -> Tensor:
        mask = torch.ones(*tokens.shape, units, dtype=torch.float64, requires_grad=True)
        width = linear.in_features // units
        linear.register_forward_pre_hook(lambda _, args: (args[0] * mask.repeat_interleave(width, -1),))
        return mask

    masks = [
        [hook(projections(exact, layer)[name], units) for name, units in zip(OUTPUTS, units_of(model), strict=True)]
        for layer in range(3)
    ]
    differentiate(exact, tokens)
    for layer, pair in enumerate(masks):
        assert_importances(method, layer, [mask.grad.square().mean((0, 1)) for mask in pair], 1e-3)  # type: ignore[union-attr]


# K-FAC


def damped(matrix: np.ndarray) -> np.ndarray:
    return matrix + DAMPING * np.diag(matrix).mean() * np.eye(len(matrix))


def least_loss_without(columns: list[int], weight: np.ndarray, a: np.ndarray, f: np.ndarray) -> float:
    """min tr(F·Δ·A·Δᵀ) over all Δ with Δ = −W in these columns: the other columns of Δ solve Δ_S·A_SS = W_P·A_PS."""
    others = [j for j in range(weight.shape[1]) if j not in columns]
    change = np.zeros_like(weight)
    change[:, columns] = -weight[:, columns]
    change[:, others] = np.linalg.solve(a[np.ix_(others, others)], a[np.ix_(others, columns)] @ weight[:, columns].T).T
    return float(np.trace(f @ change @ a @ change.T))


def kfac_costs(weight: np.ndarray, a: np.ndarray, f: np.ndarray, width: int) -> list[float]:
    """What every unit adds to the least loss when its turn comes, whole problems solved anew for every one."""
    a, f = damped(a), damped(f)
    units = weight.shape[1] // width
    each = 1 if width > 1 else -(-units // ROUNDS)
    costs, gone, before = [0.0] * units, [], 0.0

    def columns(of: list[int]) -> list[int]:
        return [unit * width + column for unit in of for column in range(width)]

    while len(gone) < units:
        left = [unit for unit in range(units) if unit not in gone]
        added = {unit: least_loss_without(columns([*gone, unit]), weight, a, f) - before for unit in left}
        removed = sorted(left, key=lambda unit: added[unit])[:each]
        for unit in removed:
            costs[unit] = added[unit]
        gone += removed
        before = least_loss_without(columns(gone), weight, a, f)
    return costs


def inputs_and_gradients(model: PreTrainedModel, tokens: Tensor, layer: int) -> list[tuple[np.ndarray, ...]]:
    """Of o_proj and down_proj: what they read, the gradient of the summed loss at their output, and what the norm that
    follows, if one does, divides that by; a row per token."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: object, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        seen.append((args[0].detach(), output))

    handles = [projections(model, layer)[name].register_forward_hook(keep) for name in OUTPUTS]
    differentiate(model, tokens)
    for handle in handles:
        handle.remove()
    found = []
    for x, y in seen:
        r = torch.ones_like(y[..., :1]).detach()
        if model.config.model_type in ("gemma2", "olmo2"):
            r = (y.detach().square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        found.append(tuple(one.flatten(0, 1).numpy() for one in (x, y.grad, r)))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("family", "gradients"),
    [("gemma2", None), ("olmo2", 7), ("seed_oss", None), ("llama", 7), ("llama", 100)],  # of 24, 5 in a batch
)
def test_kfac_is_what_a_unit_adds_to_the_least_loss(family: str, gradients: int | None, run: Any) -> None:
    model, tokens = make_tiny(family, layers=3), tiny_tokens(24, 16)
    options = {"importance": "kfac", "temperature": 0, "gradient_samples": gradients}
    method = run(model, HGSP, 0.2, tokens, batch_size=5, **options)
    exact = copy.deepcopy(model).double()
    for layer in range(3):
        expected = []
        pairs = inputs_and_gradients(exact, tokens, layer)
        for name, units, (x, g, r) in zip(OUTPUTS, units_of(model), pairs, strict=True):
            weight = projections(exact, layer)[name].weight.detach().numpy()
            x, g = x / r, (r * g)[: len(g) if gradients is None else gradients * tokens.shape[1]]
            expected.append(kfac_costs(weight, x.T @ x / len(x), g.T @ g / len(g), weight.shape[1] // units))
        assert_importances(method, layer, expected, 2e-3)


@pytest.mark.parametrize(("gradients", "differentiated"), [(None, 24), (7, 7)])
def test_only_samples_that_are_differentiated_are_run_more_than_once(
    gradients: int | None, differentiated: int, run: Any
) -> None:
    options = {"importance": "kfac", "temperature": 0, "gradient_samples": gradients}
    method = run(make_tiny(layers=3), HGSP, 0.2, tiny_tokens(24, 16), batch_size=1, **options)
    assert method.driver.setting.model.evaluations == 3 * (24 + 2 * differentiated)


def test_the_inputs_moments_are_gone_while_units_are_removed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inverted: list[weakref.ref[Tensor]] = []

    def invert(xtx: Tensor, *arguments: Any) -> Any:
        inverted.append(weakref.ref(xtx))
        return slimgpt_math.inverse_hessian(xtx, *arguments)

    def remove(*arguments: Any) -> Any:
        assert inverted.pop()() is None
        return slimgpt_math.prune_units(*arguments)

    monkeypatch.setattr(kfac, "inverse_hessian", invert)
    monkeypatch.setattr(kfac, "prune_units", remove)
    run(make_tiny(layers=3), HGSP, 0.2, tiny_tokens(4, 16), importance="kfac", temperature=0)
    assert not inverted


@pytest.mark.parametrize("width", [1, 3])
def test_costs_equal_whole_problems_solved_anew(width: int) -> None:
    random = np.random.default_rng(0)
    units = 70 if width == 1 else 6  # 70 channels are removed three at a time
    weight, x = random.standard_normal((8, units * width)), random.standard_normal((400, units * width))
    x[:, 1] += 0.9 * x[:, 4]
    g = random.standard_normal((400, 8)) @ random.standard_normal((8, 8))
    inverse = inverse_moment(torch.from_numpy(x.T @ x), 400)
    costs = compensated_costs(torch.from_numpy(weight), inverse, torch.from_numpy(g.T @ g), 400, width)
    np.testing.assert_allclose(costs, kfac_costs(weight, x.T @ x / 400, g.T @ g / 400, width), rtol=1e-8)


def test_what_does_not_reach_the_loss_costs_nothing() -> None:
    inverse = inverse_moment(torch.eye(4), 5, torch.float32)
    costs = compensated_costs(torch.ones(3, 4), inverse, torch.zeros(3, 3), 5, 2)
    assert costs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("inputs", "gradients", "says"),
    [
        (torch.eye(4), torch.full((3, 3), torch.nan), "gradients"),
        (torch.full((4, 4), torch.inf), torch.eye(3), "XᵀX"),
        (torch.eye(4) + 4 * torch.eye(4).flip(0), torch.eye(3), "damping"),  # not positive definite
    ],
)
def test_second_moments_that_cannot_be_are_refused(inputs: Tensor, gradients: Tensor, says: str) -> None:
    with pytest.raises(FloatingPointError, match=says):
        compensated_costs(torch.ones(3, 4), inverse_moment(inputs, 5), gradients, 5, 1)


# Priors

ADDS = {"gemma4_text": ("post_attention_layernorm", "post_feedforward_layernorm")}  # what comes last in a block


def slopes(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """d(summed loss of a sample) / d(factor of what a piece adds) ``[3, L, N]``: factors 1 that take gradients."""
    model = copy.deepcopy(model).double()
    layers = model.model.layers
    factors = torch.ones(3, len(layers), len(tokens), 1, 1, dtype=torch.float64, requires_grad=True)

    def scale(piece: int, index: int, module: torch.nn.Module) -> None:
        def hook(_, args, output):
            first, *rest = output if isinstance(output, tuple) else (output,)
            begin = args[0] if piece == 0 else 0.0
            first = begin + factors[piece, index] * (first - begin)
            return (first, *rest) if isinstance(output, tuple) else first

        module.register_forward_hook(hook)

    for index, layer in enumerate(layers):
        adds = ADDS.get(model.config.model_type, ("self_attn", "mlp"))
        for piece, module in enumerate((layer, *(getattr(layer, name) for name in adds))):
            scale(piece, index, module)
    differentiate(model, tokens)
    assert factors.grad is not None
    return factors.grad[..., 0, 0]


@pytest.mark.parametrize(
    ("family", "importance"),
    [("llama", "taylor"), ("granite", "taylor"), ("gemma4_text", "taylor"), ("llama", "fisher"), ("llama", "kfac")],
)
def test_gradient_priors_are_the_second_order_estimate_along_each_piece(family: str, importance: str, run: Any) -> None:
    model, tokens = make_tiny(family, layers=3), tiny_tokens(7, 12)
    method = run(model, HGSP, 0.2, tokens, batch_size=3, importance=importance, prior="gradient")
    s = slopes(model, tokens)
    torch.testing.assert_close(method.priors, (0.5 * s.square() - s).sum(2) / (7 * 11), rtol=1e-3, atol=1e-5)


def test_gradient_prior_makes_no_evaluation_of_its_own(run: Any) -> None:
    methods = [run(make_tiny(layers=3), HGSP, prior="gradient", temperature=temperature) for temperature in (0, 1)]
    without, with_prior = (method.driver.setting.model.evaluations for method in methods)
    assert without == with_prior > 0
