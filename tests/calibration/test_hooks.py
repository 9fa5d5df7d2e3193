from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.calibration.hooks import Hooks

X = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))


class Recorder(list[tuple[Any, ...]]):
    def __call__(self, *tensors: Tensor | None) -> None:
        self.append(tensors)


class Attention(nn.Module):
    """Called by name and returning a tuple, as attention is in transformers."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return hidden_states + 1, None


def test_observers_receive_inputs_outputs_and_weights_until_hooks_are_removed() -> None:
    linear, attention, hooks = nn.Linear(3, 2), Attention(), Hooks()
    inputs, both, by_name = Recorder(), Recorder(), Recorder()
    hooks.on_input("in", linear, inputs)
    hooks.on_input_and_output("in and out", linear, both)
    hooks.on_input_and_output("attention", attention, by_name)
    weight = torch.tensor([1, 1, 0, 0])
    for weights in (None, torch.ones(4), weight):
        if weights is not None:
            hooks.set_weight(weights)
        y = linear(X)
        attention(hidden_states=X)
    hooks.remove()
    linear(X)
    attention(hidden_states=X)
    for recorder, expected in ((inputs, (X,)), (both, (X, y)), (by_name, (X, X + 1))):
        assert [call[0] is X for call in recorder] == [True] * 3
        assert all(torch.equal(call[len(expected) - 1], expected[-1]) for call in recorder)
        assert [call[-1] is weight for call in recorder] == [False, False, True]
        assert [call[-1] for call in recorder[:2]] == [None, None]  # where every sample counts
    assert hooks.tokens == dict.fromkeys(("in", "in and out", "attention"), 20 + 20 + 10)


def test_modules_that_saw_other_tokens_are_named() -> None:
    first, second, hooks = nn.Linear(3, 3), nn.Linear(3, 3), Hooks()
    hooks.on_input("first", first, Recorder())
    hooks.on_input_and_output("second", second, Recorder())
    for batch in (2, 2, 1):
        second(first(X[:batch, :4]))
    hooks.finish(20)
    for _ in range(2):  # two under one name are counted twice
        hooks.on_input_and_output("third", second, Recorder())
    second(X[:1])
    with pytest.raises(RuntimeError, match=r"20 tokens to every hooked module, but third saw 10\."):
        hooks.finish(20)
    with pytest.raises(RuntimeError, match="no module"):
        Hooks().finish(0)
