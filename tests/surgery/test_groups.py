import pytest
import torch

from lightning_prune.surgery.groups import attention_group_sums, mlp_channel_sums, unit_sums


@pytest.mark.parametrize(("kv_heads", "r"), [(4, 1), (2, 2), (1, 4), (3, 2)])
def test_group_sums_follow_contiguous_query_heads(kv_heads: int, r: int) -> None:
    d, hidden = 3, 5
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (kv_heads * r * d, hidden), "k": (kv_heads * d, hidden), "v": (kv_heads * d, hidden)}
    scores = {name: torch.rand(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    out = torch.rand(hidden, kv_heads * r * d, generator=generator, dtype=torch.float64)

    expected = [0.0] * kv_heads
    for j in range(kv_heads):
        for head in range(j * r, (j + 1) * r):
            for row in range(head * d, (head + 1) * d):
                for column in range(hidden):
                    expected[j] += scores["q"][row, column].item() + out[column, row].item()
        for row in range(j * d, (j + 1) * d):
            for column in range(hidden):
                expected[j] += scores["k"][row, column].item() + scores["v"][row, column].item()

    sums = attention_group_sums(scores["q"], scores["k"], scores["v"], out, kv_heads)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_channel_sums() -> None:
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.rand(7, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    down = torch.rand(4, 7, generator=generator, dtype=torch.float64)
    expected = [sum(gate[c, i].item() + up[c, i].item() + down[i, c].item() for i in range(4)) for c in range(7)]
    sums = mlp_channel_sums(gate, up, down)
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_scores_are_summed_in_float32(dtype: torch.dtype) -> None:
    ones = torch.ones(2, 4096, dtype=dtype)
    # 3 × 4096 needs more digits than bfloat16 has once a small score joins in.
    ones[0, 0] = 3
    sums = mlp_channel_sums(ones, ones, ones.T)
    assert sums.dtype == torch.float32
    assert sums.tolist() == [3 * 4096 + 6.0, 3 * 4096.0]
    attention = attention_group_sums(ones, ones, ones, ones.T, 2)
    assert attention.dtype == torch.float32
    assert attention.tolist() == [4 * 4096 + 8.0, 4 * 4096.0]


def test_unit_sums_of_one_projection() -> None:
    scores = torch.rand(6, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = [sum(scores[i, j].item() for i in range(2 * u, 2 * u + 2) for j in range(8)) for u in range(3)]
    columns = [sum(scores[i, j].item() for i in range(6) for j in range(2 * u, 2 * u + 2)) for u in range(4)]
    assert unit_sums(scores, 3, "rows").tolist() == pytest.approx(rows, rel=1e-12)
    assert unit_sums(scores, 4, "columns").tolist() == pytest.approx(columns, rel=1e-12)
