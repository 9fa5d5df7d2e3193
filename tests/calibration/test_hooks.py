import pytest
import torch
from torch import Tensor, nn

from lightning_prune.calibration.hooks import Hooks

X = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[Tensor | None, ...]] = []

    def __call__(self, *tensors: Tensor | None) -> None:
        self.calls.append(tensors)


class Attention(nn.Module):
    """Called by name and returning a tuple, as attention is in transformers."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return hidden_states + 1, None


def test_observers_receive_inputs_and_outputs_until_hooks_are_removed() -> None:
    linear, attention, hooks = nn.Linear(3, 2), Attention(), Hooks()
    inputs, both, by_name = Recorder(), Recorder(), Recorder()
    hooks.on_input("in", linear, inputs)
    hooks.on_input_and_output("in and out", linear, both)
    hooks.on_input_and_output("attention", attention, by_name)
    for _ in range(2):
        y = linear(X)
        attention(hidden_states=X)
        hooks.remove()
    for recorder, expected in ((inputs, (X, None)), (both, (X, y, None)), (by_name, (X, X + 1, None))):
        (call,) = recorder.calls
        assert call[0] is X
        assert all(found is wanted or torch.equal(found, wanted) for found, wanted in zip(call, expected, strict=True))
    assert not linear._forward_hooks
    assert not linear._forward_pre_hooks


def test_modules_that_saw_other_tokens_are_named() -> None:
    first, second, hooks = nn.Linear(3, 3), nn.Linear(3, 3), Hooks()
    hooks.on_input("first", first, Recorder())
    hooks.on_input_and_output("second", second, Recorder())
    for batch in (2, 2, 1):
        second(first(X[:batch, :4]))
    hooks.finish(20)
    hooks.on_input_and_output("third", second, Recorder())
    second(X[:1])
    with pytest.raises(RuntimeError, match=r"20 tokens to every hooked module, but third saw 5\."):
        hooks.finish(20)
    with pytest.raises(RuntimeError, match="no module"):
        Hooks().finish(0)


def test_samples_of_weight_zero_are_not_counted_and_the_weight_reaches_observers() -> None:
    linear, recorder, hooks = nn.Linear(3, 3), Recorder(), Hooks()
    hooks.on_input("linear", linear, recorder)
    weight = torch.tensor([1, 1, 0, 0])
    linear(X)
    for current in (torch.ones(4), weight):
        hooks.set_weight(current)
        linear(X)
    assert hooks.tokens == {"linear": 20 + 20 + 10}
    assert [call[1] is weight for call in recorder.calls] == [False, False, True]
