import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_prune.methods import HGSP
from lightning_prune.methods.kfac import DAMPING, ROUNDS, compensated_costs
from tests.methods.running import projections, run_method, save_base
from tests.tiny import make_tiny, tiny_tokens


def damped(matrix: np.ndarray) -> np.ndarray:
    return matrix + DAMPING * np.diag(matrix).mean() * np.eye(len(matrix))


def least_loss_without(columns: list[int], weight: np.ndarray, a: np.ndarray, f: np.ndarray) -> float:
    """min tr(F·Δ·A·Δᵀ) over all Δ with Δ = −W in these columns: the other columns of Δ solve Δ_S·A_SS = W_P·A_PS."""
    others = [j for j in range(weight.shape[1]) if j not in columns]
    change = np.zeros_like(weight)
    change[:, columns] = -weight[:, columns]
    change[:, others] = np.linalg.solve(a[np.ix_(others, others)], a[np.ix_(others, columns)] @ weight[:, columns].T).T
    return float(np.trace(f @ change @ a @ change.T))


def reference(weight: np.ndarray, a: np.ndarray, f: np.ndarray, width: int) -> list[float]:
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
        leaving = sorted(left, key=lambda unit: added[unit])[:each]
        for unit in leaving:
            costs[unit] = added[unit]
        gone += leaving
        before = least_loss_without(columns(gone), weight, a, f)
    return costs


def statistics(model: PreTrainedModel, tokens: Tensor) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Of every layer's o_proj and down_proj: inputs and gradients of the summed loss at its output, a row per token."""
    kept: list[list[tuple[list[Tensor], list[Tensor]]]] = []
    for layer in range(model.config.num_hidden_layers):
        kept.append([])
        for name in ("o_proj", "down_proj"):
            inputs, outputs = [], []
            linear = projections(model, layer)[name]
            linear.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].detach()))

            def keep(_: object, args: object, output: Tensor, outputs: list[Tensor] = outputs) -> None:
                output.retain_grad()
                outputs.append(output)

            linear.register_forward_hook(keep)
            kept[-1].append((inputs, outputs))
    logits = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    (-logits[:, :-1].gather(2, tokens[:, 1:, None]).sum()).backward()
    return [
        [(x[0].flatten(0, 1).numpy(), y[0].grad.flatten(0, 1).numpy()) for x, y in layer]  # type: ignore[union-attr]
        for layer in kept
    ]


@pytest.mark.parametrize(
    ("family", "gradients"),
    [("gemma2", None), ("seed_oss", None), ("llama", 7), ("llama", 100)],  # of 24, 5 in a batch
)
def test_importance_is_what_a_unit_adds_to_the_least_loss(family: str, gradients: int | None, tmp_path: Path) -> None:
    model = make_tiny(family, layers=3)
    tokens = tiny_tokens(24, 16)
    base = save_base(model, tmp_path / "base")
    method = HGSP(base, 0.2, importance="kfac", temperature=0, gradient_samples=gradients)
    run_method(method, tokens, tmp_path / "run", batch_size=5)
    exact = copy.deepcopy(model).double()
    found = statistics(exact, tokens)
    for layer, pair in enumerate(found):
        units = (model.config.num_key_value_heads, model.config.intermediate_size)
        for block, name, count, (x, g) in zip(("attention", "mlp"), ("o_proj", "down_proj"), units, pair, strict=True):
            weight = projections(exact, layer)[name].weight.detach().numpy()
            g = g[: len(g) if gradients is None else gradients * tokens.shape[1]]
            expected = reference(weight, x.T @ x / len(x), g.T @ g / len(g), weight.shape[1] // count)
            costs = torch.from_numpy(method.scores.importance[method.scores.of(layer, block)])
            torch.testing.assert_close(costs, torch.tensor(expected, dtype=torch.float64), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize(("gradients", "differentiated"), [(None, 24), (7, 7)])
def test_only_samples_that_are_differentiated_are_run_more_than_once(
    gradients: int | None, differentiated: int, tmp_path: Path
) -> None:
    base = save_base(make_tiny(layers=3), tmp_path / "base")
    method = HGSP(base, 0.2, importance="kfac", temperature=0, gradient_samples=gradients)
    run_method(method, tiny_tokens(24, 16), tmp_path / "run", batch_size=1)
    assert method.driver.setting.model.evaluations == 3 * (24 + 2 * differentiated)


@pytest.mark.parametrize("width", [1, 3])
def test_costs_equal_whole_problems_solved_anew(width: int) -> None:
    random = np.random.default_rng(0)
    units = 70 if width == 1 else 6  # 70 channels leave three at a time
    weight, x = random.standard_normal((8, units * width)), random.standard_normal((400, units * width))
    x[:, 1] += 0.9 * x[:, 4]
    g = random.standard_normal((400, 8)) @ random.standard_normal((8, 8))
    costs = compensated_costs(
        *(torch.from_numpy(m) for m in (weight, x.T @ x, g.T @ g)), tokens=(400, 400), width=width
    )
    np.testing.assert_allclose(costs, reference(weight, x.T @ x / 400, g.T @ g / 400, width), rtol=1e-8)


def test_a_channel_that_others_can_stand_in_for_costs_next_to_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 30, generator=generator, dtype=torch.float64)  # few enough to leave one by one
    x[:, 7] = 0.5 * x[:, 2] - x[:, 11]
    weight = torch.randn(6, 30, generator=generator, dtype=torch.float64)
    costs = compensated_costs(weight, x.T @ x, torch.eye(6, dtype=torch.float64), (500, 500), 1)
    least = int(costs.argmin())
    assert least in (2, 7, 11)  # whichever goes, the two others make up for it
    assert float(costs[least]) < 0.05 * float(costs.median())
    assert min(float(costs[unit]) for unit in {2, 7, 11} - {least}) > 0.1 * float(costs.median())  # but only for one


def test_what_does_not_reach_the_loss_costs_nothing() -> None:
    costs = compensated_costs(torch.ones(3, 4), torch.eye(4), torch.zeros(3, 3), (5, 5), 2, torch.float32)
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
        compensated_costs(torch.ones(3, 4), inputs, gradients, (5, 5), 1)
