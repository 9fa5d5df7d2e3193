"""Gradients layer by layer are those of the whole model."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_prune.calibration.backward import BackwardPass
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.loop import CalibrationLoop
from lightning_prune.calibration.statistics.gradients import LayerGradients
from lightning_prune.models.families import LayerStructure, layer_structures
from tests.calibration.driving import drive
from tests.cutting import MemorySource, layered
from tests.methods.running import mean_token_loss
from tests.tiny import EVERY_FAMILY, make_tiny, tiny_tokens


class Gradients(BackwardPass):
    """Leaves the seven gradients of every layer."""

    name = "gradients"

    def watch(self, view: LayerStructure) -> None:
        self.gradients = LayerGradients(view)

    def expect(self, tokens: int) -> None:
        self.gradients.tokens = tokens

    def conclude(self, view: LayerStructure) -> LayerResult:
        self.gradients.remove()
        return LayerResult(weights={role: self.gradients.take(role) for role in view.linears})


def expected_gradients(model: PreTrainedModel, tokens: Tensor) -> list[dict[str, Tensor]]:
    """Autograd through the whole model in float64."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    mean_token_loss(model, tokens).backward()
    return [
        {role: linear.part(linear.module.weight.grad) for role, linear in view.linears.items()}
        for view in layer_structures(model)
    ]


def assert_close(loop: CalibrationLoop, expected: list[dict[str, Tensor]], tolerance: float) -> None:
    for layer, theirs in enumerate(expected):
        mine = loop.new_parameters_of(layer)
        assert mine.keys() == theirs.keys()
        for role, gradient in mine.items():
            error = (gradient.double() - theirs[role]).norm() / theirs[role].norm()
            assert float(error) < tolerance, (layer, role)


CASES = [
    *(("llama", torch.float32, batch_size, 0) for batch_size in (1, 5)),
    *(("llama", torch.float32, batch_size, 3) for batch_size in (1, 2, 3, 8)),  # samples that only fill up batches
    *((family, torch.float32, 2, 0) for family in EVERY_FAMILY),
    ("llama", torch.float64, 2, 0),  # in which nothing but the fp32 loss and sum is rounded
]


@pytest.mark.parametrize(("family", "dtype", "batch_size", "padding"), CASES)
def test_gradients_are_those_of_the_mean_loss_in_the_whole_model(
    tmp_path: Path, family: str, dtype: torch.dtype, batch_size: int, padding: int
) -> None:
    model, tokens = make_tiny(family).to(dtype), tiny_tokens(5, 9)
    loop = drive([Gradients()], layered(model), tokens, tmp_path, batch_size=batch_size, padding=padding)
    # Jamba's scan sums in fp32: plain autograd of the whole model is 1.1e-5 away as well.
    tolerance = 1e-6 if dtype == torch.float64 else 2e-5 if family == "jamba" else 1e-5
    assert_close(loop, expected_gradients(model, tokens), tolerance)


def test_fp16_gradients_are_not_lost(tmp_path: Path) -> None:
    """Weights whose gradients of the mean loss lie below what fp16 can say: the sum keeps them."""
    model, tokens = make_tiny(), tiny_tokens(6, 100)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.mul_(2**-6)
    half = copy.deepcopy(model).half().float()  # the numbers that fp16 weights stand for
    expected = expected_gradients(half, tokens)
    found = drive([Gradients()], layered(model, torch.float16), tokens, tmp_path)
    steps = [gradient.abs() / 599 for layer in expected for gradient in layer.values()]
    assert max(float((step < 2**-25).double().mean()) for step in steps) > 0.5  # a mean would lose most of some matrix
    assert_close(found, expected, 0.05)


def test_layers_are_entered_once_forward_and_once_backward(tmp_path: Path) -> None:
    model = layered(make_tiny())
    source: MemorySource = model._reader.source  # type: ignore[assignment]
    drive([Gradients()], model, tiny_tokens(4, 9), tmp_path, batch_size=2)
    counts = [source.asked.count(f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(4)]
    assert counts == [2, 2, 2, 1]  # the last stays: backward begins with it
    assert model.evaluations == 2 * 2 * 4
    assert not any(parameter.requires_grad for parameter in model.net.parameters())
    assert all(parameter.is_meta for layer in model.layers for parameter in layer.parameters())


def test_boundaries_are_given_back_as_backward_goes(tmp_path: Path) -> None:
    one = Gradients()
    drive([one], layered(make_tiny()), tiny_tokens(2, 9), tmp_path, stop_after=4 + 2)  # layers 3 and 2 are done
    assert [store.values is None for store in one.boundaries] == [False, False, True, True]
