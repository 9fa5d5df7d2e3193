"""Experts of real classes of transformers, taken apart and routed token by token."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.models.experts import Experts, unroute
from lightning_prune.models.families import count_parameters
from lightning_prune.models.records import FAMILIES
from tests.tiny import EXPERTS, in_double, make_moe, moe_block

ROUTED: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}  # routers compute in fp32
GROUPED = ("glm4_moe", "deepseek_v3", "nemotron_h")
SIGMOID = (*GROUPED, "lfm2_moe")
SHARED = ("glm4_moe", "deepseek_v3", "ernie4_5_moe")  # whose width is that of one expert, or of two


def weights(block: Any, x: Tensor, family: str, experts: list[int]) -> Tensor:
    """The router's weights for one token x ``[D]``, ``[len(experts)]``, 0 where an expert is not chosen."""
    router = block.router if hasattr(block, "router") else block.gate
    if family == "gemma4_text":
        normed = x / (x.square().mean() + router.eps).sqrt() * router.scale / len(x) ** 0.5
        shares = (router.proj.weight[experts] @ normed).float().softmax(0).to(x)
        best = shares.topk(router.config.top_k_experts).indices
        scaled = shares[best] / shares[best].sum() * router.per_expert_scale[experts][best]
        return torch.zeros_like(shares).scatter(0, best, scaled)
    logits = router.weight[experts] @ x
    if family in ("gpt_oss", "granitemoe", "granitemoehybrid"):
        logits = logits + (router.bias[experts] if family == "gpt_oss" else 0)
        chosen = logits.topk(router.top_k).indices
        return torch.zeros_like(logits).scatter(0, chosen, logits[chosen].softmax(0))
    scores = logits.sigmoid() if family in SIGMOID else logits.softmax(0)
    ranked = scores.clone()
    if family == "lfm2_moe":
        ranked += block.expert_bias[experts]
    if family in GROUPED:
        ranked += router.e_score_correction_bias[experts]
        groups = ranked.view(router.num_group, -1)
        best = groups.topk(2).values.sum(1).topk(router.topk_group).indices
        ranked = torch.full_like(groups, -torch.inf).index_copy(0, best, groups[best]).flatten()
    if family == "ernie4_5_moe":
        ranked += router.moe_statics.e_score_correction_bias[0, experts]
    chosen = ranked.topk(router.top_k).indices
    share = scores[chosen]
    if family not in ("olmoe", "qwen2_moe", "jamba"):  # whose tiny configs do not normalise
        share = share / share.sum()
    return torch.zeros_like(logits).scatter(0, chosen, share * getattr(router, "routed_scaling_factor", 1))


def naive(block: nn.Module, x: Tensor, family: str, experts: list[int], channels: Tensor | None = None) -> Tensor:
    """The output of the block for x ``[T, D]``, token by token, with some of its experts and channels only."""
    found: Any = block
    module = found.experts
    out, silu = torch.zeros_like(x), nn.functional.silu
    act = partial(nn.functional.gelu, approximate="tanh") if family == "gemma4_text" else silu
    m = module.down_proj.shape[1 if family == "gpt_oss" else 2]
    for token, hidden in enumerate(x):
        for place, gate in enumerate(weights(found, hidden, family, experts)):
            number, kept = experts[place], torch.arange(m) if channels is None else channels[place]
            down = module.down_proj[number]
            if family == "nemotron_h":
                inner = (module.up_proj[number][kept] @ hidden).relu() ** 2
            elif family == "gpt_oss":
                both, down = hidden @ module.gate_up_proj[number] + module.gate_up_proj_bias[number], down.T
                g, u = both[2 * kept].clamp(max=module.limit), both[2 * kept + 1].clamp(-module.limit, module.limit)
                inner = (u + 1) * g * (g * module.alpha).sigmoid()
                out[token] += gate * module.down_proj_bias[number]
            else:
                both = module.gate_up_proj[number] @ hidden
                inner = act(both[kept]) * both[m + kept]
            out[token] += gate * (down[:, kept] @ inner)
        for mlp in [getattr(found, name) for name in ("shared_expert", "shared_experts") if hasattr(found, name)]:
            up = mlp.up_proj(hidden)
            inner = up.relu() ** 2 if family == "nemotron_h" else silu(mlp.gate_proj(hidden)) * up
            if family in SHARED and channels is not None:
                kept = [n * m + k for n, own in enumerate(channels[len(experts) :].tolist()) for k in own]
                out[token] += mlp.down_proj.weight[:, kept] @ inner[kept]
            else:
                gated = found.shared_expert_gate(hidden).sigmoid() if hasattr(found, "shared_expert_gate") else 1
                out[token] += gated * mlp.down_proj(inner)
    return out


def block_of(family: str) -> tuple[nn.Module, Experts]:
    block, names = in_double(make_moe(family)), FAMILIES[family].experts
    assert names is not None
    return block, Experts(block, names)


def run(block: nn.Module, x: Tensor) -> Tensor:
    output = block(x[None])
    return (output[0] if isinstance(output, tuple) else output)[0]


X = torch.randn(7, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("kind", EXPERTS)
@torch.no_grad()
def test_routed_tokens_inner_activations_and_outputs_add_up_to_the_block(kind: str) -> None:
    block, experts = block_of(kind)
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []
    experts.module.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    expected = run(block, X)
    (hidden, index, weights), routed = seen[0]
    total = torch.zeros_like(expected)
    for expert, rows, gate in experts.routed(index, weights):
        total[rows] += gate[:, None] * experts.output(expert, experts.inner(expert, hidden[rows]))
    alone = hasattr(block, "shared_expert_gate") or kind == "nemotron_h"  # whose shared expert stays whole
    torch.testing.assert_close(total, routed if alone else expected)
    torch.testing.assert_close(naive(block, X, kind, list(range(experts.count))), expected, **ROUTED)


@pytest.mark.parametrize("kind", EXPERTS)
@torch.no_grad()
def test_a_router_that_knows_fewer_experts_is_the_block_without_the_others(kind: str) -> None:
    block, experts = block_of(kind)
    before, kept = run(block, X), [0, 2, 5, 6]
    experts.route_to(kept)
    found = run(block, X)
    unroute(experts.module)
    torch.testing.assert_close(found, naive(block, X, kind, kept), **ROUTED)
    assert torch.equal(run(block, X), before)


@pytest.mark.parametrize("kind", EXPERTS)
@torch.no_grad()
def test_cut_parameters_are_the_block_of_what_is_kept(kind: str) -> None:
    block, experts = block_of(kind)
    kept = [1, 2, 5, 7]
    channels = torch.stack(
        [
            torch.randperm(12, generator=torch.Generator().manual_seed(e))[:5].sort()[0]
            for e in [*kept, *range(8, experts.total)]
        ]
    )
    expected = naive(block, X, kind, kept, channels)
    parts = {name: experts.kept_part(name, value, kept, channels) for name, value in block.state_dict().items()}
    cut = in_double(make_moe(kind, num_experts=4, width=5))
    cut.load_state_dict(parts)
    torch.testing.assert_close(run(cut, X), expected, **ROUTED)


@pytest.mark.parametrize("kind", EXPERTS)
def test_costs_and_sums_are_those_of_what_a_unit_takes_along(kind: str) -> None:
    block, experts = block_of(kind)
    wide, narrow, fewer = (
        count_parameters(moe_block(make_moe(kind, **options))) for options in ({}, {"width": 11}, {"num_experts": 7})
    )
    assert experts.total * experts.channel_cost == wide - narrow
    assert experts.expert_cost == wide - fewer
    sums = experts.channel_sums(lambda role, e: experts.part(role, e).detach().abs())
    only = torch.tensor([[4]] * (1 + experts.total - experts.count))
    parts = {
        name: experts.kept_part(name, value.detach(), [3], only).abs().sum()
        for name, value in block.named_parameters()
        if "_proj" in name and "bias" not in name
    }
    torch.testing.assert_close(sums[3, 4], sum(part for name, part in parts.items() if "shared" not in name))
    if kind in SHARED:
        torch.testing.assert_close(sums[8:, 4].sum(), sum(part for name, part in parts.items() if "shared" in name))
