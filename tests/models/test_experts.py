"""Experts of real classes of transformers, taken apart and routed token by token."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.models.experts import Experts, unroute
from lightning_prune.models.records import ExpertNames
from tests.tiny import in_double, make_moe, moe_block

KINDS = ["qwen3_moe", "gpt_oss"]  # [E, 2m, D]; [E, D, 2m] with gate and up interleaved, and biases


def naive(block: nn.Module, x: Tensor, family: str, experts: list[int], channels: Tensor | None = None) -> Tensor:
    """The output of the block for x ``[T, D]``, token by token, with some of its experts and channels only."""
    found: Any = block
    module, router = found.experts, found.router if family == "gpt_oss" else found.gate
    logits = x @ router.weight[experts].T + (router.bias[experts] if family == "gpt_oss" else 0)
    out = torch.zeros_like(x)
    for token, scores in enumerate(logits if family == "gpt_oss" else logits.softmax(-1)):
        top = scores.topk(router.top_k)
        share = top.values.softmax(0) if family == "gpt_oss" else top.values / top.values.sum()
        for gate, place in zip(share, top.indices.tolist(), strict=True):
            number = experts[place]
            m = module.down_proj.shape[2 if family != "gpt_oss" else 1]
            for k in range(m) if channels is None else channels[place].tolist():
                if family == "gpt_oss":
                    weight, bias = module.gate_up_proj[number], module.gate_up_proj_bias[number]
                    g = (x[token] @ weight[:, 2 * k] + bias[2 * k]).clamp(max=module.limit)
                    u = (x[token] @ weight[:, 2 * k + 1] + bias[2 * k + 1]).clamp(-module.limit, module.limit)
                    out[token] += gate * (u + 1) * g * (g * module.alpha).sigmoid() * module.down_proj[number, k]
                else:
                    weight = module.gate_up_proj[number]
                    g, u = x[token] @ weight[k], x[token] @ weight[m + k]
                    out[token] += gate * nn.functional.silu(g) * u * module.down_proj[number, :, k]
            if family == "gpt_oss":
                out[token] += gate * module.down_proj_bias[number]
    return out


def block_of(family: str) -> tuple[nn.Module, Experts]:
    block = in_double(make_moe(family))
    return block, Experts(block, ExpertNames(router="router" if family == "gpt_oss" else "gate"))


def run(block: nn.Module, x: Tensor) -> Tensor:
    output = block(x[None])
    return (output[0] if isinstance(output, tuple) else output)[0]


X = torch.randn(7, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_routed_tokens_inner_activations_and_outputs_add_up_to_the_block(kind: str) -> None:
    block, experts = block_of(kind)
    seen: list[tuple[Tensor, ...]] = []
    experts.module.register_forward_pre_hook(lambda _, args: seen.append(args))
    expected = run(block, X)
    hidden, index, weights = seen[0]
    total = torch.zeros_like(expected)
    for expert, rows, gate in experts.routed(index, weights):
        total[rows] += gate[:, None] * experts.output(expert, experts.inner(expert, hidden[rows]))
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(naive(block, X, kind, list(range(experts.count))), expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_router_that_knows_fewer_experts_is_the_block_without_the_others(kind: str) -> None:
    block, experts = block_of(kind)
    before, kept = run(block, X), [0, 2, 3, 6]
    experts.route_to(kept)
    found = run(block, X)
    unroute(experts.module)
    torch.testing.assert_close(found, naive(block, X, kind, kept))
    assert torch.equal(run(block, X), before)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cut_parameters_are_the_block_of_what_is_kept(kind: str) -> None:
    block, experts = block_of(kind)
    kept = [1, 2, 5, 7]
    channels = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(e))[:5].sort()[0] for e in kept])
    expected = naive(block, X, kind, kept, channels)
    parts = {name: experts.kept_part(name, value, kept, channels) for name, value in block.state_dict().items()}
    cut = in_double(make_moe(kind, num_experts=4, width=5))
    cut.load_state_dict(parts)
    torch.testing.assert_close(run(cut, X), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_costs_and_sums_are_those_of_what_a_unit_takes_along(kind: str) -> None:
    block, experts = block_of(kind)
    wide, narrow, fewer = (
        sum(p.numel() for p in moe_block(make_moe(kind, **options)).parameters())
        for options in ({}, {"width": 11}, {"num_experts": 7})
    )
    assert experts.count * experts.channel_cost == wide - narrow
    assert experts.expert_cost == wide - fewer
    sums = experts.channel_sums(
        lambda role, e: (experts.inner_weight if role == "inner" else experts.down)[e].detach().abs()
    )
    parts = [
        experts.kept_part(name, value.detach(), [3], torch.tensor([[4]])).abs().sum()
        for name, value in block.named_parameters()
        if name.endswith("_proj")
    ]
    torch.testing.assert_close(sums[3, 4], sum(parts))
