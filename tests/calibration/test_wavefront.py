"""Removal priors: the numbers of whole forwards for half the layer evaluations, each layer brought in once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune.calibration.loop import CalibrationLoop
from lightning_prune.calibration.wavefront import RemovalPass
from lightning_prune.models.families import layers_of
from lightning_prune.models.records import FAMILIES
from tests.calibration.driving import drive
from tests.cutting import MemorySource, layered
from tests.methods.test_hgsp import reference_priors
from tests.tiny import EVERY_FAMILY, ONE_BLOCK, make_tiny, tiny_tokens


def delta_of(loop: CalibrationLoop) -> torch.Tensor:
    return torch.tensor(loop.results_of("prior")[-1][1].facts["delta"], dtype=torch.float64)


@pytest.mark.parametrize(("layers", "blocks"), [(1, True), (2, True), (8, True), (5, False)])
def test_priors_are_those_of_whole_forwards_for_the_stated_number_of_evaluations(
    tmp_path: Path, layers: int, blocks: bool
) -> None:
    dense, tokens = make_tiny(layers=layers), tiny_tokens(3, 10)
    model = layered(dense)
    expected = reference_priors(dense, tokens)
    if not blocks:
        expected[1:] = torch.nan
    delta = delta_of(drive([RemovalPass(blocks=blocks)], model, tokens, tmp_path, batch_size=2))
    torch.testing.assert_close(delta, expected, rtol=1e-3, atol=2e-6, equal_nan=True)
    states, pieces = (2, 3) if blocks else (1, 1)
    batches = 2
    assert model.evaluations == batches * (states * layers + pieces * layers * (layers - 1) // 2)
    source: MemorySource = model._reader.source  # type: ignore[assignment]
    assert all(source.asked.count(f"model.layers.{layer}.mlp.up_proj.weight") == 1 for layer in range(layers))


MIXERS = ("linear_attn", "conv", "mamba", "self_attn", "attention")


def no_attention(hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return torch.zeros_like(hidden_states), None


def nothing(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return torch.zeros_like(hidden_states)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), *((family, torch.bfloat16) for family in EVERY_FAMILY)]
)
def test_restarting_behind_a_piece_is_bit_identical_to_a_whole_forward(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    model = make_tiny(family, layers=3)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model = model.to(dtype)
    for name, buffer in buffers.items():  # rotary tables and the like, which transformers keeps in fp32
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer
    tokens = tiny_tokens(2, 10)
    one = RemovalPass()
    drive([one], layered(model), tokens, tmp_path, batch_size=2)

    def loss() -> float:
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        return float(losses.double().sum())

    assert float(one.losses.dense) == loss()
    for index, layer in enumerate(layers_of(model)):
        values = FAMILIES[family].layer_returns
        layer.forward = lambda hidden, *_, n=values, **__: (hidden, None)[:n] if n else hidden
        assert float(one.losses.removed[0, index]) == loss()
        del layer.forward
        if family in ONE_BLOCK:
            continue
        first = {name: getattr(layer, name, None) for name in MIXERS}
        for name, module in first.items():
            if module is not None:
                module.forward = no_attention if name in ("self_attn", "attention") else nothing
        assert float(one.losses.removed[1, index]) == loss()
        for module in filter(None, first.values()):
            del module.forward
        mlp = next(getattr(layer, name) for name in ("mlp", "feed_forward", "shared_mlp") if hasattr(layer, name))
        mlp.forward = torch.zeros_like
        assert float(one.losses.removed[2, index]) == loss()
        del mlp.forward


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_samples_that_only_fill_up_and_those_beyond_the_prefix_do_not_count(tmp_path: Path, batch_size: int) -> None:
    dense, tokens = make_tiny(layers=3), tiny_tokens(7, 9)
    expected = delta_of(drive([RemovalPass()], layered(dense), tokens[:5], tmp_path, batch_size=5))
    padded = drive([RemovalPass()], layered(dense), tokens[:5], tmp_path, batch_size=batch_size, padding=3)
    prefix = drive([RemovalPass(5)], layered(dense), tokens, tmp_path, batch_size=batch_size, padding=1)
    for loop in (padded, prefix):
        torch.testing.assert_close(delta_of(loop), expected, rtol=1e-5, atol=1e-6)
