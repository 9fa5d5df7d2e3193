"""Scores of experts and channels against float64 loops: one token, one of its experts, one channel at a time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.calibration.statistics.routed import RoutedGrams, RoutedOutputs, RoutedSlopes
from lightning_prune.methods import experts
from lightning_prune.methods.fisher import FisherPass
from lightning_prune.methods.heapr import HEAPrPass
from lightning_prune.methods.kfac import compensated_costs, inverse_moment, kfac_of_experts
from lightning_prune.methods.reap import Criterion, ExpertActivityPass
from lightning_prune.models.experts import Experts
from lightning_prune.models.family import ExpertNames
from lightning_prune.models.vocabulary import Block
from tests.tiny import in_double, make_moe

T, D, E, M = 40, 32, 8, 12


class Naive:
    """The block of a tiny model, and what the router sends where: (token, expert, g, a, f) of every pair."""

    def __init__(self) -> None:
        self.block: Any = in_double(make_moe())
        self.experts = Experts(self.block, ExpertNames())
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(T, D, generator=generator, dtype=torch.float64)
        # of a loss per token at the block's output
        self.delta = torch.randn(T, D, generator=generator, dtype=torch.float64)
        module, self.pairs, args = self.block.experts, [], self.block.gate(self.x)
        self.weights, self.index = args[1].detach(), args[2]
        for token in range(T):
            for g, e in zip(self.weights[token], self.index[token].tolist(), strict=True):
                rows = module.gate_up_proj[e].detach() @ self.x[token]
                a = rows[:M] * rows[:M].sigmoid() * rows[M:]
                self.pairs.append((token, e, float(g), a, module.down_proj[e].detach() @ a))

    def of(self, expert: int) -> list[Any]:
        return [pair for pair in self.pairs if pair[1] == expert]

    def feed(self, statistic: Any, gradient: bool, *more: Tensor) -> Any:
        """In batches of unequal size; ``more`` has a row per token."""
        for rows in (slice(0, 7), slice(7, 31), slice(31, T)):
            args = (self.x[rows], self.index[rows], self.weights[rows])
            statistic.update(*args, *([self.delta[rows]] if gradient else []), *(one[rows] for one in more))
        statistic.reduced()
        return statistic


@pytest.fixture(scope="module")
def naive() -> Naive:
    return Naive()


def close(found: Tensor, expected: Any, **options: float) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, **({"rtol": 1e-5, "atol": 1e-9} | options))


def test_activity_of_whole_experts(naive: Naive) -> None:
    sums = naive.feed(RoutedOutputs(naive.experts), gradient=False)
    per_expert = [naive.of(e) for e in range(E)]
    assert all(per_expert)
    close(sums.peaks, [max(float(f.abs().max()) for *_, f in pairs) for pairs in per_expert])
    mean = [sum(g * float(f.norm()) for _, _, g, _, f in pairs) / len(pairs) for pairs in per_expert]
    close(activity("reap", sums), mean)
    close(activity("frequency", sums), [len(pairs) for pairs in per_expert])
    close(activity("ean", sums), [sum(float(f.norm()) for *_, f in pairs) for pairs in per_expert])


def activity(criterion: Criterion, sums: RoutedOutputs) -> Tensor:
    """What REAP's pass concludes in a layer with these sums."""
    measuring = ExpertActivityPass(criterion)
    measuring.sums = sums
    view: Any = SimpleNamespace(index=0)
    return measuring.conclude(view).importance[Block.EXPERT]


def test_magnitude_and_wanda_of_channels(naive: Naive) -> None:
    sums = naive.feed(RoutedOutputs(naive.experts), gradient=False)
    size, weighed = torch.zeros(E, M, dtype=torch.float64), torch.zeros(E, M, dtype=torch.float64)
    for e in range(E):
        x2, a2 = torch.zeros(D, dtype=torch.float64), torch.zeros(M, dtype=torch.float64)
        for token, _, g, a, _ in naive.of(e):
            x2 += (g * naive.x[token]) ** 2
            a2 += (g * a) ** 2
        inner, down = (
            naive.block.experts.gate_up_proj[e].detach().abs(),
            naive.block.experts.down_proj[e].detach().abs(),
        )
        for k in range(M):
            size[e, k] = inner[k].sum() + inner[M + k].sum() + down[:, k].sum()
            weighed[e, k] = ((inner[k] + inner[M + k]) * x2.sqrt()).sum() + (down[:, k] * a2[k].sqrt()).sum()
    close(experts.magnitude(naive.experts), size)
    close(experts.wanda(sums), weighed)


def test_heapr_and_fisher_of_channels(naive: Naive) -> None:
    sums = naive.feed(RoutedSlopes(naive.experts), gradient=True)
    heapr, fisher = torch.zeros(2, E, M, dtype=torch.float64)
    for e in range(E):
        pairs, down = naive.of(e), naive.block.experts.down_proj[e].detach()
        gradients = torch.stack([g * naive.delta[token] for token, _, g, _, _ in pairs])
        inner = torch.stack([a for *_, a, _ in pairs])
        second = sum(torch.outer(one, one) for one in gradients) / len(pairs)
        for k in range(M):
            heapr[e, k] = inner[:, k].square().mean() * (down[:, k] @ second @ down[:, k]) * len(pairs) / T
            fisher[e, k] = (inner[:, k] * (gradients @ down[:, k])).square().sum() / T
    close(HEAPrPass.expert_score(sums), heapr)
    close(FisherPass.expert_score(sums), fisher)


@pytest.mark.parametrize("sized", [False, True])
def test_kfac_of_channels_is_that_of_the_down_projection_on_the_expert_s_tokens(naive: Naive, sized: bool) -> None:
    r = torch.linspace(0.01, 3, T, dtype=torch.float64)[:, None] if sized else torch.ones(T, 1, dtype=torch.float64)
    sums = naive.feed(RoutedGrams(naive.experts), True, *([r.float()] if sized else []))
    found = kfac_of_experts(sums, torch.float64)
    for e in range(E):
        pairs = naive.of(e)
        inner = torch.stack([a / r[token] for token, _, _, a, _ in pairs])
        gradients = torch.stack([g * naive.delta[token] * r[token] for token, _, g, _, _ in pairs])
        weight = naive.block.experts.down_proj[e].detach()
        inverse = inverse_moment(inner.T @ inner, len(pairs))
        costs = compensated_costs(weight, inverse, gradients.T @ gradients, len(pairs), 1)
        close(found[e], costs * len(pairs) / T, rtol=1e-3)


def test_an_expert_without_tokens_is_worth_nothing() -> None:
    own = Experts(in_double(make_moe()), ExpertNames())
    x, delta = torch.randn(6, D, dtype=torch.float64), torch.randn(6, D, dtype=torch.float64)
    index, weights = torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5, dtype=torch.float64)
    outputs, slopes, grams = RoutedOutputs(own), RoutedSlopes(own), RoutedGrams(own)
    outputs.update(x, index, weights)
    for statistic in (slopes, grams):
        statistic.update(x, index, weights, delta)
        statistic.reduced()
    found = [activity("reap", outputs)[:, None], HEAPrPass.expert_score(slopes), FisherPass.expert_score(slopes)]
    for scores in (*found, kfac_of_experts(grams, torch.float64)):
        assert bool((scores[:2] > 0).all())
        assert not bool(scores[2:].any())


def test_super_experts_peak_above_all_others_and_above_a_tenth_of_the_largest() -> None:
    peaks = torch.rand(4, 128, generator=torch.Generator().manual_seed(0))
    assert int(experts.super_experts(peaks).sum()) == 3  # above a quantile alone, some always are
    peaks[1, 5], peaks[2, 7] = 400.0, 30.0  # 30 is below a tenth
    assert experts.super_experts(peaks).nonzero().tolist() == [[1, 5]]
