"""Zeroing single weights: the Wanda paper's masks and the magnitude baseline, against naive references."""

import copy
from typing import Any

import pytest
import torch

from lightning_prune.checkpoint.cut import layout_of
from lightning_prune.methods import Magnitude, Wanda
from lightning_prune.methods.mask_pruning import MaskRule, mask_layer
from lightning_prune.models.families import layer_structures
from tests.methods.running import inputs_of, projections, pruned_by
from tests.tiny import make_tiny, tiny_tokens


def zero_lowest(row_scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(row_scores)), key=lambda j: (row_scores[j], j))[:count])


def reference_wanda(model, tokens: torch.Tensor, structure: str, sequential: bool):
    """Layer by layer: norms of all seven inputs before the layer is touched, from whole float64 forwards."""
    model = copy.deepcopy(model).double()
    dense = copy.deepcopy(model)
    for layer in range(len(model.model.layers)):
        source = model if sequential else dense
        norms = {
            name: inputs_of(source, linear, tokens).square().sum(0).sqrt()
            for name, linear in projections(source, layer).items()
        }
        for name, linear in projections(model, layer).items():
            weight = linear.weight.data
            for row in weight:
                scores = (row.abs() * norms[name]).tolist()
                if structure == "unstructured":
                    gone = zero_lowest(scores, len(scores) // 2)
                else:
                    n, m = map(int, structure.split(":"))
                    gone = {
                        start + j
                        for start in range(0, len(scores), m)
                        for j in zero_lowest(scores[start : start + m], m - n)
                    }
                for j in gone:
                    row[j] = 0
    return model


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("sequential", [True, False])
def test_wanda_masks_equal_the_reference(structure: str, sequential: bool, run: Any) -> None:
    model = make_tiny("qwen2", layers=2)
    tokens = tiny_tokens(6, 10)
    method = run(model, Wanda, 0.5, tokens, batch_size=4, structure=structure, sequential=sequential)
    expected = reference_wanda(model, tokens, structure, sequential)
    for layer in range(2):
        for name, linear in projections(pruned_by(method), layer).items():
            want = projections(expected, layer)[name].weight
            assert torch.equal(linear.weight == 0, want == 0), (layer, name)
            torch.testing.assert_close(linear.weight.double(), want.detach(), rtol=1e-6, atol=0)


def test_magnitude_masks_prune_exactly_the_share_of_every_matrix(run: Any) -> None:
    model = make_tiny(layers=2)
    method = run(model, Magnitude, 0.29, tiny_tokens(2, 8), structure="unstructured")
    for layer in range(2):
        for name, linear in projections(pruned_by(method), layer).items():
            before = projections(model, layer)[name].weight
            count = before.numel() * 29 // 100
            assert int((linear.weight == 0).sum()) == count
            threshold = before.abs().flatten().sort().values[count - 1]
            assert torch.equal(linear.weight != 0, before.abs() > threshold)


def test_masked_checkpoints_are_stock_and_say_that_nothing_gets_smaller(run: Any) -> None:
    method = run(make_tiny(layers=2), Wanda, tokens=tiny_tokens(4, 8), structure="2:4")
    assert layout_of(pruned_by(method).config) == "stock"
    assert method.plan.parameters["dense"] == method.plan.parameters["pruned"]
    assert method.plan.achieved_ratio == pytest.approx(0.5)
    assert method.plan.pruning_ratio == 0.5
    assert "memory and speed do not change" in (method.pruned_folder / "README.md").read_text()
    assert method.plan.weights_updated


def test_embeddings_head_and_frozen_layers_are_untouched(run: Any) -> None:
    model = make_tiny(layers=3, tied=False)
    method = run(model, Wanda, 0.5, tiny_tokens(4, 8), structure="unstructured", freeze_first_n_layers=1)
    assert torch.equal(pruned_by(method).model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.equal(pruned_by(method).lm_head.weight, model.lm_head.weight)
    for name, linear in projections(pruned_by(method), 0).items():
        assert torch.equal(linear.weight, projections(model, 0)[name].weight)
    assert int((projections(pruned_by(method), 1)["q_proj"].weight == 0).sum()) == 32 * 16


# The rule alone

SCORES = torch.rand(6, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scores", [SCORES, torch.ones(6, 24)], ids=["random", "ties"])
@pytest.mark.parametrize(
    ("rule", "run", "count"),  # so many of every run of scores, row by row
    [
        *((MaskRule((n, m), 0.5), m, m - n) for n, m in ((2, 4), (4, 8), (1, 4), (3, 4))),
        *((MaskRule(None, part), 24, count) for part, count in ((0.0, 0), (0.1, 2), (0.5, 12), (0.99, 23), (1.0, 24))),
        *((MaskRule(None, part, per_tensor=True), 144, int(part * 144)) for part in (0.0, 0.29, 0.5, 1.0)),
    ],
    ids=str,
)
def test_the_lowest_are_removed_and_of_ties_the_first(
    rule: MaskRule, run: int, count: int, scores: torch.Tensor
) -> None:
    flat = scores.double().flatten().tolist()
    expected = {start + i for start in range(0, 144, run) for i in zero_lowest(flat[start : start + run], count)}
    assert rule.mask(scores).shape == scores.shape
    assert set(rule.mask(scores).flatten().nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize(
    ("size", "fraction", "count"), [(100, 0.29, 29), (10, 0.7, 7), (1000, 0.57, 570), (30, 0.1, 3)]
)
def test_shares_follow_the_decimal_fraction_not_its_rounding(size: int, fraction: float, count: int) -> None:
    assert int(MaskRule(None, fraction).mask(torch.rand(1, size)).sum()) == count


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="layer 0, query projection: scores are NaN"):
        mask_layer(layer_structures(make_tiny())[0], MaskRule(None, 0.5), lambda role: torch.full((2, 4), torch.nan))
