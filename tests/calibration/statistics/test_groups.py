from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.calibration.statistics.groups import group_importance
from lightning_prune.models.vocabulary import ROLES_OF, Block

HEAD, HIDDEN, CHANNELS = 3, 5, 7


def importance(scores: dict[str, Tensor], kv_heads: int, channels: int) -> tuple[Tensor, Tensor]:
    parts = {block: SimpleNamespace(linears=roles) for block, roles in ROLES_OF.items()}
    units = {Block.ATTENTION: kv_heads, Block.MLP: channels}
    view: Any = SimpleNamespace(prunable=tuple(parts), parts=parts, units=units.__getitem__)
    asked: list[str] = []
    found = group_importance(view, lambda role: (asked.append(role), scores[role])[1])
    assert sorted(asked) == sorted(scores)  # one matrix at a time, each once
    return found[Block.ATTENTION], found[Block.MLP]


def random_scores(kv_heads: int, r: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = {"query": kv_heads * r * HEAD, "key": kv_heads * HEAD, "value": kv_heads * HEAD}
    rows |= {"gate": CHANNELS, "up": CHANNELS, "output": kv_heads * r * HEAD, "down": CHANNELS}
    scores = {name: torch.rand(n, HIDDEN, generator=generator, dtype=torch.float64) for name, n in rows.items()}
    return scores | {role: scores[role].T for role in ("output", "down")}


@pytest.mark.parametrize(("kv_heads", "r"), [(4, 1), (2, 2), (1, 4), (3, 2)])
def test_importance_sums_over_contiguous_query_heads_and_over_channels(kv_heads: int, r: int) -> None:
    scores = random_scores(kv_heads, r)
    groups = [0.0] * kv_heads
    for head in range(kv_heads * r):
        rows = range(head * HEAD, (head + 1) * HEAD)
        groups[head // r] += sum(float(scores["query"][row].sum() + scores["output"][:, row].sum()) for row in rows)
        if head < kv_heads:
            groups[head] += sum(float(scores["key"][row].sum() + scores["value"][row].sum()) for row in rows)
    channels = [float((scores["gate"][c] + scores["up"][c] + scores["down"][:, c]).sum()) for c in range(CHANNELS)]
    for found, expected in zip(importance(scores, kv_heads, CHANNELS), (groups, channels), strict=True):
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_scores_are_summed_in_float32(dtype: torch.dtype) -> None:
    ones = torch.ones(2, 4096, dtype=dtype)
    ones[0, 0] = 3  # 3 × 4096 needs more digits than bfloat16 has once a small score joins in
    scores = {role: ones.T if role in ("output", "down") else ones for role in random_scores(1, 1)}
    for found, matrices in zip(importance(scores, 2, 2), (4, 3), strict=True):
        assert found.dtype == torch.float32
        assert found.tolist() == [matrices * 4098.0, matrices * 4096.0]
