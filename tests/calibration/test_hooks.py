import pytest
import torch
from torch import Tensor, nn

from lightning_prune.calibration.hooks import Hooks


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[Tensor | None, ...]] = []

    def __call__(self, *tensors: Tensor | None) -> None:
        self.calls.append(tensors)


class Attention(nn.Module):
    """Called by name and returning a tuple, as attention is in transformers."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return hidden_states + 1, None


def hook_count(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def test_observers_receive_inputs_and_outputs() -> None:
    linear = nn.Linear(3, 2)
    x = torch.randn(4, 5, 3)
    inputs, both = Recorder(), Recorder()
    with Hooks() as hooks:
        hooks.on_input("in", linear, inputs)
        hooks.on_input_and_output("in and out", linear, both)
        y = linear(x)
    assert inputs.calls[0][0] is x
    assert both.calls[0][0] is x
    assert both.calls[0][1] is not None
    assert torch.equal(both.calls[0][1], y)
    assert inputs.calls[0][1] is None


def test_inputs_by_name_and_tuple_outputs_are_understood() -> None:
    module, both = Attention(), Recorder()
    x = torch.zeros(1, 2, 3)
    with Hooks() as hooks:
        hooks.on_input_and_output("attention", module, both)
        module(hidden_states=x)
    assert both.calls[0][0] is x
    assert torch.equal(both.calls[0][1], x + 1)  # type: ignore[arg-type]


def test_all_hooks_are_removed_at_the_end_and_after_an_exception() -> None:
    linear, recorder = nn.Linear(3, 3), Recorder()
    with Hooks() as hooks:
        hooks.on_input("a", linear, recorder)
        hooks.on_input_and_output("b", linear, recorder)
        assert hook_count(linear) == 2
    assert hook_count(linear) == 0

    def explode(x: Tensor, weight: Tensor | None) -> None:
        raise ArithmeticError

    def failing_pass() -> None:
        with Hooks() as hooks:
            hooks.on_input("a", linear, recorder)
            hooks.on_input("b", linear, explode)
            linear(torch.zeros(1, 1, 3))

    with pytest.raises(ArithmeticError):
        failing_pass()
    assert hook_count(linear) == 0


def test_remove_works_without_a_with_block_and_twice() -> None:
    linear, recorder = nn.Linear(3, 3), Recorder()
    hooks = Hooks()
    hooks.on_input("a", linear, recorder)
    hooks.remove()
    hooks.remove()
    linear(torch.zeros(1, 1, 3))
    assert recorder.calls == []


def test_tokens_are_counted_per_module() -> None:
    first, second, recorder = nn.Linear(3, 3), nn.Linear(3, 3), Recorder()
    with Hooks() as hooks:
        hooks.on_input("first", first, recorder)
        hooks.on_input_and_output("second", second, recorder)
        for batch in (2, 2, 1):
            second(first(torch.zeros(batch, 4, 3)))
        hooks.assert_tokens(20)
        second(torch.zeros(1, 4, 3))
        with pytest.raises(RuntimeError, match=r"20 tokens.*second saw 24") as error:
            hooks.assert_tokens(20)
    assert "first" not in str(error.value)


def test_a_module_that_never_ran_is_named() -> None:
    with Hooks() as hooks:
        hooks.on_input("idle", nn.Linear(3, 3), Recorder())
        with pytest.raises(RuntimeError, match="idle saw 0"):
            hooks.assert_tokens(8)


def test_asserting_without_hooks_fails() -> None:
    with pytest.raises(RuntimeError, match="no module"):
        Hooks().assert_tokens(0)


def test_samples_of_weight_zero_are_not_counted_and_the_weight_reaches_observers() -> None:
    linear, recorder = nn.Linear(3, 3), Recorder()
    weight = torch.tensor([1, 1, 0, 0])
    with Hooks() as hooks:
        hooks.on_input("linear", linear, recorder)
        for current in (torch.ones(4), weight, None):
            hooks.set_weight(current)
            linear(torch.zeros(4, 5, 3))
    assert hooks.tokens == {"linear": 20 + 10 + 20}
    assert [call[1] is weight for call in recorder.calls] == [False, True, False]


def test_names_are_unique() -> None:
    linear = nn.Linear(3, 3)
    with Hooks() as hooks:
        hooks.on_input("a", linear, Recorder())
        with pytest.raises(ValueError, match="'a'"):
            hooks.on_input("a", linear, Recorder())
