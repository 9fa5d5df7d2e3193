"""Gradients: right sums, one copy in memory, and nothing left behind."""

import pytest
import torch
from lightning_prune.statistics.token_loss import token_losses
from torchmetrics import Metric

from lightning_prune.statistics.gradients import GradientSums
from lightning_prune.surgery.anatomy import anatomy
from tests.tiny import make_tiny, tiny_tokens


def backward(model: torch.nn.Module, sums: GradientSums, tokens: torch.Tensor) -> None:
    losses = token_losses(model(input_ids=tokens, use_cache=False).logits, tokens)
    sums.expect(len(tokens), losses.numel())
    losses.mean().backward()


def held_elements(sums: GradientSums) -> int:
    """Elements of every tensor the statistics keep: states, torchmetrics' defaults and cached results."""
    storages = {}
    for metric in sums.modules():
        if isinstance(metric, Metric):
            kept = [getattr(metric, name) for name in metric._defaults] + list(metric._defaults.values())
            kept += [metric._computed] if isinstance(metric._computed, torch.Tensor) else []
            storages |= {tensor.data_ptr(): tensor.numel() for tensor in kept}
    return sum(storages.values())


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_take_one_copy_of_the_prunable_weights_and_nothing_else(tied: bool) -> None:
    model = make_tiny(tied=tied).requires_grad_(False)
    views = anatomy(model)
    sums = GradientSums(views)
    for sample in tiny_tokens(4, 8):
        backward(model, sums, sample[None])
        assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []
    assert model.get_input_embeddings().weight.requires_grad is False
    assert model.get_output_embeddings().weight.requires_grad is False
    for view in views:
        sums.of(view.index)
    prunable = sum(linear.weight.numel() for view in views for linear in view.linears.values())
    counters = 8 * len(sums.sums)
    assert prunable <= held_elements(sums) <= prunable + counters
    sums.remove()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_unequal_batches_sum_to_the_gradient_of_the_token_mean() -> None:
    model = make_tiny().requires_grad_(False)
    tokens = tiny_tokens(5, 8)
    sums = GradientSums(anatomy(model))
    for batch in tokens.split([3, 2]):
        backward(model, sums, batch)
    got = sums.of(1)["down"]
    sums.remove()

    reference = make_tiny().double()
    logits = reference(input_ids=tokens, use_cache=False).logits
    total = torch.zeros((), dtype=torch.float64)
    for sample, row in zip(tokens, logits, strict=True):
        for position in range(7):
            total = total - torch.log_softmax(row[position], 0)[sample[position + 1]]
    (total / 35).backward()
    expected = reference.model.layers[1].mlp.down_proj.weight.grad
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-7)
