"""Gradients: right sums, one copy in memory, and nothing left behind."""

import pytest
import torch
from torch import nn
from torchmetrics import Metric

from lightning_prune.calibration.statistics.gradients import LayerGradients
from lightning_prune.models.families import layer_structures
from tests.tiny import make_tiny, tiny_tokens


def backward(model: nn.Module, layers: list[LayerGradients], tokens: torch.Tensor) -> None:
    """Backward of the summed loss through the whole model."""
    logits = model(input_ids=tokens, use_cache=False).logits
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    for layer in layers:
        layer.tokens = losses.numel()
    losses.sum().backward()


def held_elements(layers: list[LayerGradients]) -> int:
    """Elements of every tensor the statistics keep: states, torchmetrics' defaults and cached results."""
    storages = {}
    for metric in (module for layer in layers for module in layer.modules()):
        if isinstance(metric, Metric):
            kept = [getattr(metric, name) for name in metric._defaults] + list(metric._defaults.values())
            kept += [metric._computed] if isinstance(metric._computed, torch.Tensor) else []
            storages |= {tensor.data_ptr(): tensor.numel() for tensor in kept}
    return sum(storages.values())


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_take_one_copy_of_the_prunable_weights_and_nothing_else(tied: bool) -> None:
    model = make_tiny(tied=tied).requires_grad_(False)
    views = layer_structures(model)
    layers = [LayerGradients(view) for view in views]
    for sample in tiny_tokens(4, 8):
        backward(model, layers, sample[None])
        assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []
    assert model.get_input_embeddings().weight.requires_grad is False
    assert model.get_output_embeddings().weight.requires_grad is False
    prunable = sum(linear.weight.numel() for view in views for linear in view.linears.values())
    counters = 8 * sum(len(layer.sums) for layer in layers)
    assert prunable <= held_elements(layers) <= prunable + counters
    for layer in layers:
        layer.remove()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    held, layer = held_elements(layers[2:3]), layers[2]
    for role, linear in layer.view.linears.items():
        taken = layer.take(role)
        assert (taken.dtype, taken.shape) == (torch.float32, linear.weight.shape)
        held -= linear.weight.numel()
        assert held_elements([layer]) <= held
        with pytest.raises(KeyError):
            layer.take(role)


def test_gradients_that_are_not_finite_name_layer_and_projection() -> None:
    model = make_tiny().requires_grad_(False)
    layer = LayerGradients(layer_structures(model)[1])
    backward(model, [layer], tiny_tokens(1, 8))
    layer.sums["gate"].gradient[3, 4] = torch.inf  # type: ignore[union-attr, index, operator]
    with pytest.raises(FloatingPointError, match="layer 1, gate projection: 1 "):
        layer.take("gate")
    layer.take("up")
