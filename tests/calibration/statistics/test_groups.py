from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.calibration.statistics.groups import group_importance, unit_sums
from lightning_prune.models.vocabulary import Block


def importance(scores: dict[str, Tensor], kv_heads: int, channels: int) -> tuple[Tensor, Tensor]:
    view: Any = SimpleNamespace(units={Block.ATTENTION: kv_heads, Block.MLP: channels}.__getitem__)
    found = group_importance(view, scores.__getitem__)
    return found[Block.ATTENTION], found[Block.MLP]


def random_scores(kv_heads: int, r: int, d: int, hidden: int, channels: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (kv_heads * r * d, hidden), "key": (kv_heads * d, hidden), "value": (kv_heads * d, hidden)}
    shapes |= {"output": (hidden, kv_heads * r * d), "gate": (channels, hidden), "up": (channels, hidden)}
    shapes |= {"down": (hidden, channels)}
    return {role: torch.rand(shape, generator=generator, dtype=torch.float64) for role, shape in shapes.items()}


@pytest.mark.parametrize(("kv_heads", "r"), [(4, 1), (2, 2), (1, 4), (3, 2)])
def test_group_sums_follow_contiguous_query_heads(kv_heads: int, r: int) -> None:
    d, hidden = 3, 5
    scores = random_scores(kv_heads, r, d, hidden, 7)

    expected = [0.0] * kv_heads
    for j in range(kv_heads):
        for head in range(j * r, (j + 1) * r):
            for row in range(head * d, (head + 1) * d):
                for column in range(hidden):
                    expected[j] += scores["query"][row, column].item() + scores["output"][column, row].item()
        for row in range(j * d, (j + 1) * d):
            for column in range(hidden):
                expected[j] += scores["key"][row, column].item() + scores["value"][row, column].item()

    sums, _ = importance(scores, kv_heads, 7)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_channel_sums() -> None:
    scores = random_scores(2, 2, 3, 4, 7)
    gate, up, down = scores["gate"], scores["up"], scores["down"]
    expected = [sum(gate[c, i].item() + up[c, i].item() + down[i, c].item() for i in range(4)) for c in range(7)]
    _, sums = importance(scores, 2, 7)
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_scores_are_summed_in_float32(dtype: torch.dtype) -> None:
    ones = torch.ones(2, 4096, dtype=dtype)
    # 3 × 4096 needs more digits than bfloat16 has once a small score joins in.
    ones[0, 0] = 3
    scores = {role: ones.T if role in ("output", "down") else ones for role in random_scores(1, 1, 1, 1, 1)}
    groups, channels = importance(scores, 2, 2)
    assert channels.dtype == torch.float32
    assert channels.tolist() == [3 * 4096 + 6.0, 3 * 4096.0]
    assert groups.dtype == torch.float32
    assert groups.tolist() == [4 * 4096 + 8.0, 4 * 4096.0]


def test_scores_are_asked_for_once_each() -> None:
    scores, asked = random_scores(2, 2, 3, 4, 7), []
    view: Any = SimpleNamespace(units={Block.ATTENTION: 2, Block.MLP: 7}.__getitem__)
    group_importance(view, lambda role: (asked.append(role), scores[role])[1])
    assert sorted(asked) == sorted(scores)


def test_unit_sums_of_one_projection() -> None:
    scores = torch.rand(6, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = [sum(scores[i, j].item() for i in range(2 * u, 2 * u + 2) for j in range(8)) for u in range(3)]
    columns = [sum(scores[i, j].item() for i in range(6) for j in range(2 * u, 2 * u + 2)) for u in range(4)]
    assert unit_sums(scores, 3, "rows").tolist() == pytest.approx(rows, rel=1e-12)
    assert unit_sums(scores, 4, "columns").tolist() == pytest.approx(columns, rel=1e-12)
