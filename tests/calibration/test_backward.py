"""Gradients layer by layer are those of the whole model."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_prune.calibration.backward import BackwardPass
from lightning_prune.calibration.layer_result import LayerResult
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


Matrices = dict[str, Tensor]


def walked(
    model: PreTrainedModel, tokens: Tensor, folder: Path, dtype: torch.dtype | None = None, **options: int
) -> list[Matrices]:
    net = layered(model, dtype)
    loop = drive([Gradients()], net, tokens, folder, **options)  # type: ignore[arg-type]
    return [loop.new_parameters_of(layer) for layer in range(net.num_layers)]


def expected_gradients(model: PreTrainedModel, tokens: Tensor) -> list[Matrices]:
    """Autograd through the whole model in float64."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    mean_token_loss(model, tokens).backward()
    return [
        {role: linear.part(linear.module.weight.grad) for role, linear in view.linears.items()}
        for view in layer_structures(model)
    ]


def assert_close(found: list[Matrices], expected: list[Matrices], tolerance: float) -> None:
    assert len(found) == len(expected)
    for layer, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine.keys() == theirs.keys()
        for role, gradient in mine.items():
            error = (gradient.double() - theirs[role].double()).norm() / theirs[role].double().norm()
            assert float(error) < tolerance, (layer, role)


@pytest.mark.parametrize(
    ("family", "batch_size"), [("llama", 1), ("llama", 5), *((family, 2) for family in EVERY_FAMILY)]
)
def test_gradients_are_those_of_the_mean_loss_in_the_whole_model(tmp_path: Path, family: str, batch_size: int) -> None:
    model, tokens = make_tiny(family), tiny_tokens(5, 9)
    found = walked(model, tokens, tmp_path, batch_size=batch_size)
    # Jamba's scan sums in fp32: plain autograd of the whole model is 1.1e-5 away as well.
    assert_close(found, expected_gradients(model, tokens), 2e-5 if family == "jamba" else 1e-5)


def test_in_float64_nothing_but_the_fp32_loss_and_sum_is_rounded(tmp_path: Path) -> None:
    model, tokens = make_tiny().double(), tiny_tokens(4, 9)
    assert_close(walked(model, tokens, tmp_path), expected_gradients(model, tokens), 1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_samples_that_only_fill_up_batches_do_not_count(tmp_path: Path, batch_size: int) -> None:
    model, tokens = make_tiny(), tiny_tokens(5, 9)
    found = walked(model, tokens, tmp_path, batch_size=batch_size, padding=3)
    assert_close(found, expected_gradients(model, tokens), 1e-5)


def test_fp16_gradients_are_not_lost(tmp_path: Path) -> None:
    """Weights whose gradients of the mean loss lie below what fp16 can say: the sum keeps them."""
    model, tokens = make_tiny(), tiny_tokens(6, 100)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.mul_(2**-6)
    half = copy.deepcopy(model).half().float()  # the numbers that fp16 weights stand for
    expected = expected_gradients(half, tokens)
    found = walked(model, tokens, tmp_path, torch.float16)
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
