from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lightning_prune.calibration.statistics import gram
from lightning_prune.methods import slimgpt_math
from lightning_prune.methods.slimgpt_math import (
    HeadError,
    InverseHessian,
    PrunedLinear,
    choose_dtype,
    group_size_schedule,
    inverse_hessian,
    prune_units,
    solver_bytes,
)
from tests.live_bytes import LiveBytes

Array = npt.NDArray[np.float64]
Errors = Callable[[Array, Array], Array]


def problem(tokens: int = 60, columns: int = 12, rows: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated inputs X ``[tokens, columns]`` and W ``[rows, columns]``, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    return x, torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def naive_hessian(x: Tensor, num_samples: int, damping: float) -> Array:
    hessian = 2 / num_samples * sum(np.outer(row, row) for row in x.double().numpy())
    for j in range(len(hessian)):
        if hessian[j, j] == 0:
            hessian[j, j] = 1
    return np.asarray(hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian)))


def naive_channel_errors(weight: Array, hessian: Array) -> Array:
    inverse = np.linalg.inv(hessian)
    return np.array([sum(weight[:, j] ** 2) / inverse[j, j] for j in range(len(hessian))])


def naive_head_errors(width: int, kind: HeadError) -> Errors:
    def errors(weight: Array, hessian: Array) -> Array:
        inverse = np.linalg.inv(hessian)
        result = []
        for start in range(0, len(hessian), width):
            b = slice(start, start + width)
            if kind == "exact":
                result.append(np.trace(weight[:, b] @ np.linalg.inv(inverse[b, b]) @ weight[:, b].T))
            else:
                diagonal = np.diag(np.linalg.cholesky(inverse[b, b]))
                result.append(sum(sum(weight[:, start + j] ** 2) / diagonal[j] ** 2 for j in range(width)))
        return np.array(result)

    return errors


def naive_greedy(
    weight: Array, hessian: Array, width: int, group_sizes: list[int], errors: Errors
) -> tuple[list[int], Array, dict[int, float]]:
    """Every round from scratch: errors from a fresh inverse, W'_S = W_S + W_P·H_PS·H_SS⁻¹ by an explicit inverse."""
    alive = list(range(len(hessian) // width))
    seen: dict[int, float] = {}
    for size in group_sizes:
        current = errors(weight, hessian)
        victims = sorted(range(len(alive)), key=lambda i: (current[i], i))[:size]
        seen |= {alive[i]: current[i] for i in victims}
        removed = [i * width + k for i in victims for k in range(width)]
        kept = [c for c in range(len(hessian)) if c not in removed]
        update = weight[:, removed] @ hessian[np.ix_(removed, kept)] @ np.linalg.inv(hessian[np.ix_(kept, kept)])
        weight, hessian = weight[:, kept] + update, hessian[np.ix_(kept, kept)]
        alive = [unit for i, unit in enumerate(alive) if i not in victims]
    return alive, weight, seen | dict(zip(alive, errors(weight, hessian), strict=True))


# The Hessian


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.float64, 1e-9)])
def test_inverse_is_symmetric_and_of_the_dtype_asked_for(dtype: torch.dtype, tolerance: float) -> None:
    x, _ = problem()
    x[:, 4] = 0  # a dead input has a diagonal of 1 before its mean is taken
    xtx = (x.T @ x).to(dtype)
    before = xtx.clone()
    result = inverse_hessian(xtx, 3, 0.01, dtype)
    assert torch.equal(xtx, before)
    assert result.dead.tolist() == [j == 4 for j in range(12)]
    expected = np.linalg.inv(naive_hessian(x, 3, 0.01))
    assert result.inverse.dtype == dtype
    assert result.damping == 0.01
    assert torch.equal(result.inverse, result.inverse.T)
    np.testing.assert_allclose(
        result.inverse.numpy(), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["few tokens", "twins"])
def test_singular_hessian_raises_the_damping_and_reports_it(dtype: torch.dtype, kind: str) -> None:
    for seed in range(20):
        x, _ = problem(tokens=5 if kind == "few tokens" else 60, columns=16, seed=seed)
        x[:, 3] = x[:, 2]
        x = x.to(dtype)
        result = inverse_hessian(x.T @ x, 3, 0.0, dtype)
        assert result.damping == pytest.approx(0.001)
        expected = np.linalg.inv(naive_hessian(x, 3, result.damping))
        np.testing.assert_allclose(result.inverse.numpy(), expected, rtol=0, atol=1e-2 * np.abs(expected).max())


def test_channels_of_very_different_size_need_no_more_damping() -> None:
    x, _ = problem(columns=4)
    x = x * torch.tensor([1e-6, 1.0, 1e3, 1e6], dtype=torch.float64)
    assert inverse_hessian(x.T @ x, 3, damping=0.0).damping == 0.0


def test_damping_rises_tenfold_until_the_limit() -> None:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[0, 1] = matrix[1, 0] = 1.5  # eigenvalue −0.5: positive definite from λ = 0.5
    assert inverse_hessian(matrix, 2, damping=0.01).damping == pytest.approx(1.0)
    matrix[0, 1] = matrix[1, 0] = 2.5
    with pytest.raises(FloatingPointError, match=r"neither at damping 0\.01 nor at 1"):
        inverse_hessian(matrix, 2, damping=0.01)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_products_are_refused(value: float) -> None:
    matrix = torch.eye(3)
    matrix[1, 2] = value
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        inverse_hessian(matrix, 1)


# Greedy pruning


@pytest.mark.parametrize(
    ("width", "kind", "group_sizes"),
    [
        *((3, kind, [1] * count) for kind in ("slimgpt", "exact") for count in (1, 4)),
        *((1, "channels", sizes) for sizes in ([1] * 6, [3, 2, 1], [6], [11])),
    ],
)
def test_greedy_pruning_equals_deriving_every_round_from_scratch(width: int, kind: Any, group_sizes: list[int]) -> None:
    errors_of = naive_channel_errors if kind == "channels" else naive_head_errors(width, kind)
    for seed in range(4):
        x, weight = problem(tokens=80, columns=15, seed=seed)
        hessian = naive_hessian(x, 3, 0.01)
        kept, expected, errors = naive_greedy(weight.numpy(), hessian, width, group_sizes, errors_of)
        heads = () if kind == "channels" else (width, kind)
        shares: list[float] = []
        pruned = prune_units(weight, inverse_hessian(x.T @ x, 3, 0.01), group_sizes, *heads, on_round=shares.append)
        assert shares == [size / sum(group_sizes) for size in group_sizes]
        assert pruned.kept.tolist() == kept
        np.testing.assert_allclose(pruned.weight.numpy(), expected, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(pruned.errors.numpy(), [errors[unit] for unit in range(15 // width)], rtol=1e-8)


def test_what_is_kept_undamped_is_the_least_squares_refit() -> None:
    x, weight = problem()
    pruned = prune_units(weight, inverse_hessian(x.T @ x, 3, 0.0), [2, 1], 2)
    kept = [column for unit in pruned.kept.tolist() for column in (2 * unit, 2 * unit + 1)]
    expected = np.linalg.lstsq(x.numpy()[:, kept], x.numpy() @ weight.numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(pruned.weight.numpy(), expected, rtol=1e-7, atol=1e-9)


def test_dead_inputs_go_first_and_cost_nothing_and_of_ties_the_lower_index() -> None:
    x, weight = problem()
    x[:, [2, 9]] = 0
    pruned = prune_units(weight, inverse_hessian(x.T @ x, 3), [1, 1])
    assert pruned.kept.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 10, 11]
    assert pruned.errors[[2, 9]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(pruned.weight, weight[:, pruned.kept])
    weight, eye = torch.ones(2, 200, dtype=torch.float64), torch.eye(200, dtype=torch.float64)
    assert prune_units(weight, inverse_hessian(eye, 1), [7]).kept.tolist() == list(range(7, 200))
    assert prune_units(weight, inverse_hessian(eye, 1), [1] * 3, 10).kept.tolist() == list(range(3, 20))


def test_the_weight_is_lifted_and_not_touched_and_comes_back_bit_for_bit_where_nothing_is_removed() -> None:
    x, weight = problem()
    x[:, 3] = 0
    half = weight.bfloat16()
    before = half.clone()
    for rounds, width in (([], 4), ([], 1), ([1], 4)):
        pruned = prune_units(half, inverse_hessian(x.T @ x, 3), rounds, width)
        assert torch.equal(half, before)
        assert pruned.weight.dtype == torch.float64
        assert bool(rounds) or torch.equal(pruned.weight, half.double())


def test_fp32_follows_float64() -> None:
    x, weight = problem(tokens=400, columns=64, rows=16)
    exact = prune_units(weight, inverse_hessian(x.T @ x, 4), group_size_schedule(32))
    single = prune_units(weight.float(), inverse_hessian(x.T @ x, 4, dtype=torch.float32), group_size_schedule(32))
    assert single.weight.dtype == torch.float32
    assert torch.equal(single.kept, exact.kept)
    torch.testing.assert_close(single.weight.double(), exact.weight, rtol=1e-3, atol=1e-3)


def test_a_broken_inverse_is_refused_instead_of_returning_nonsense() -> None:
    _, weight = problem()
    dead = torch.zeros(12, dtype=torch.bool)
    for width, message in ((4, "not positive definite"), (1, "negative or NaN")):
        with pytest.raises(FloatingPointError, match=message):
            prune_units(weight, InverseHessian(-torch.eye(12, dtype=torch.float64), dead, 0.01), [1], width)


# Memory and chunks


@pytest.mark.parametrize("chunk", [1, 30])
@pytest.mark.parametrize("kind", ["channels", "slimgpt", "exact"])
def test_results_do_not_depend_on_the_size_of_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int, kind: str) -> None:
    x, weight = problem(tokens=150, columns=60, rows=9)

    def prune() -> PrunedLinear:
        heads = ([9, 5, 1, 1, 20],) if kind == "channels" else ([1] * 7, 6, kind)
        return prune_units(weight, inverse_hessian(x.T @ x, 3), *heads)  # type: ignore[arg-type]

    whole = prune()
    monkeypatch.setattr(slimgpt_math, "CHUNK", chunk)
    monkeypatch.setattr(slimgpt_math, "UPDATE_ROWS", 7)
    monkeypatch.setattr(gram, "MIRROR_BLOCK", 13)
    chunked = prune()
    assert torch.equal(chunked.kept, whole.kept)
    torch.testing.assert_close(chunked.weight, whole.weight, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(chunked.errors, whole.errors, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverting_and_pruning_need_what_solver_bytes_says(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(slimgpt_math, "CHUNK", 2**14)  # small beside the matrix, as it is in a real layer
    monkeypatch.setattr(gram, "MIRROR_BLOCK", 64)
    n = 768
    matrix = n * n * dtype.itemsize
    x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(0))
    xtx, weight = x.T @ x, torch.randn(n, n, generator=torch.Generator().manual_seed(1))
    few = x[:64].T @ x[:64]  # fewer tokens than columns: λ = 0 must fail, and another needs no second matrix
    with LiveBytes() as inverting:
        assert inverse_hessian(few, 1, 0.0, dtype).damping > 0
    assert inverting.peak < 1.2 * matrix
    for solve in (
        lambda hessian: prune_units(weight, hessian, group_size_schedule(n // 2)),
        lambda hessian: prune_units(weight, hessian, [1] * 3, 128, "exact"),
    ):
        with LiveBytes() as inverting:
            hessian = inverse_hessian(xtx, 128, dtype=dtype)
        assert inverting.peak < 1.2 * matrix
        with LiveBytes() as pruning:  # beside H⁻¹ itself
            solve(hessian)
        assert pruning.peak + matrix < solver_bytes(n, dtype)


def test_float64_is_chosen_where_it_fits() -> None:
    needed = solver_bytes(4096, torch.float64)
    assert 2 * 8 * 4096**2 < needed < 3 * 8 * 4096**2
    assert solver_bytes(4096, torch.float32) * 2 == needed
    assert choose_dtype(4096, needed) == torch.float64
    assert choose_dtype(4096, needed - 1) == torch.float32


# Batch sizes


def test_group_sizes_sum_to_the_target_and_dynamic_ones_follow_the_released_rule() -> None:
    for target in (0, 1, 7, 8, 9, 511, 512, 513, 2752, 9000):
        for kind in ("dynamic", 1, 8, 1000):
            sizes = group_size_schedule(target, kind)  # type: ignore[arg-type]
            assert sum(sizes) == target
            assert all(size >= 1 for size in sizes)
    assert group_size_schedule(2752) == [1024, 256, *[64] * 23]
    assert group_size_schedule(1000) == [244, *[64] * 11, 52]
    assert group_size_schedule(100) == [64, 36]
