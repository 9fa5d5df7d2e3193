"""The refit of experts against one that goes token by token, in float64."""

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lightning_prune
from lightning_prune.checkpoint.expert_plans import kept_experts
from lightning_prune.checkpoint.in_memory_plan import InMemoryPlan
from lightning_prune.data.sampling import held_out_samples
from lightning_prune.methods import HGSP, REAP
from lightning_prune.models.experts import ROLE
from lightning_prune.models.families import layer_structures
from tests.methods.running import run_method, save_base
from tests.tiny import make_moe, tiny_tokens

TOKENS, DAMPING = tiny_tokens(40, 20), 0.05
Array = np.ndarray[Any, np.dtype[np.float64]]


def ridge(x: Array, y: Array, old: Array) -> Array:
    """argmin ‖x·Wᵀ − y‖² + λ·Σ_j (xᵀx)_jj·‖W_j − old_j‖²."""
    gram = x.T @ x
    pull = np.diag(DAMPING * np.diag(gram))
    result: Array = np.linalg.solve(gram + pull, (y.T @ x + old @ pull).T).T
    return result


def inner(layer: Any, expert: int, x: Array) -> Array:
    """act(W_gate·x) ⊙ (W_up·x)."""
    gate, up = np.split(layer.mlp.experts.gate_up_proj[expert].double().numpy() @ x, 2)
    result: Array = gate / (1 + np.exp(-gate)) * up
    return result


@pytest.mark.parametrize("make", [partial(HGSP, importance="kfac", temperature=0.0), REAP])
def test_every_expert_is_fitted_to_its_share_of_what_its_tokens_lack(tmp_path: Path, make: Any) -> None:
    base = save_base(make_moe(width=24, layers=2), tmp_path / "base")
    method = run_method(make(base, 0.3, refit="residual", refit_damping=DAMPING), TOKENS, tmp_path / "run")
    dense, pruned = (lightning_prune.load(base, torch.float32).requires_grad_(False) for _ in range(2))
    plan, new = method.plan.layers, method.driver.loop.new_parameters_of
    views = layer_structures(pruned)
    kept = [kept_experts(view.experts, layer) for view, layer in zip(views, plan, strict=True) if view.experts]
    for view in views:
        InMemoryPlan(plan, new)(view)
    held = held_out_samples(TOKENS).repeat_interleave(TOKENS.shape[1]).tolist()
    fitted = 0
    for number, (here, wanted) in enumerate(zip(streams(pruned), streams(dense), strict=True)):
        layer: Any = dense.model.layers[number]
        numbers, channels = kept[number]
        columns = {e: np.arange(24) if channels is None else channels[place].numpy() for place, e in enumerate(numbers)}
        down = {e: layer.mlp.experts.down_proj[e].double().numpy()[:, columns[e]] for e in numbers}
        rows: dict[tuple[int, bool], list[tuple[Array, Array]]] = defaultdict(list)
        for token, (x, chosen, gates) in enumerate(zip(here["x"], here["chosen"], here["gates"], strict=True)):
            a = {e: inner(layer, e, x)[columns[e]] for e in chosen}
            missing = wanted["after"][token] - here["before"][token]
            missing -= sum(g * (down[e] @ a[e]) for e, g in zip(chosen, gates, strict=True))
            for e, gate in zip(chosen, gates, strict=True):
                root = np.sqrt(gate * gates.sum())
                rows[e, held[token]].append((root * a[e], root * (down[e] @ a[e] + missing / gates.sum())))
        for e in numbers:
            parts = [rows[e, out] for out in (False, True)]
            x, held_x = (np.array([a for a, _ in part]).reshape(-1, len(columns[e])) for part in parts)
            y, held_y = (np.array([target for _, target in part]).reshape(-1, 32) for part in parts)
            expected = down[e]
            if len(x) + len(held_x) >= len(columns[e]):
                tried = ridge(x, y, down[e])
                if np.square(held_x @ tried.T - held_y).sum() < np.square(held_x @ down[e].T - held_y).sum():
                    expected = ridge(np.concatenate([x, held_x]), np.concatenate([y, held_y]), down[e])
                    fitted += 1
            found = new(number)[ROLE][e].double().numpy()
            np.testing.assert_allclose(found[:, columns[e]], expected, rtol=1e-3, atol=1e-4)
            assert not np.delete(found, columns[e], axis=1).any()
    assert fitted


def streams(model: Any) -> list[dict[str, Array]]:
    """Of every layer and token: the residual stream ``before`` the experts and ``after`` them, what they read (``x``),
    those that are ``chosen``, and their ``gates``."""
    found: list[dict[str, Any]] = [{} for _ in model.model.layers]

    def keep(one: dict[str, Any], **values: Any) -> None:
        one.update({name: value.numpy().reshape(-1, value.shape[-1]) for name, value in values.items()})

    for layer, one in zip(model.model.layers, found, strict=True):
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, to=one: keep(to, before=args[0].double())
        )
        layer.mlp.experts.register_forward_pre_hook(
            lambda _, args, to=one: keep(to, x=args[0].double(), chosen=args[1], gates=args[2].double())
        )
        layer.register_forward_hook(lambda _, args, out, to=one: keep(to, after=out.double()))
    model(input_ids=TOKENS, use_cache=False)
    return found
