"""The one place where forward hooks are registered, counted and removed."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

InputObserver = Callable[[Tensor, Tensor | None], None]
ExpertObserver = Callable[[Tensor, Tensor, Tensor], None]
InputOutputObserver = Callable[[Tensor, Tensor, Tensor | None], None]


class Hooks:
    """Forward hooks that feed statistics; every module has a name of its own, under which its tokens are counted."""

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        self._weight: Tensor | None = None
        self._counted_samples: int | None = None

    def set_weight(self, weight: Tensor) -> None:
        """Sample weights ``[B]`` of the coming forward: 0 for a sample that only fills up the batch, 1 for the others.
        Observers receive them, or None where every sample counts."""
        counted = int((weight > 0).sum())
        self._weight, self._counted_samples = (None, None) if counted == len(weight) else (weight, counted)

    def on_input(self, name: str, module: nn.Module, observe: InputObserver) -> None:
        """Call ``observe(x, weight)`` before each forward of the module, x = its first input ``[B, ..., in]``."""
        self.tokens[name] = 0

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observe(self._counted(name, args, kwargs), self._weight)

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_input_and_output(self, name: str, module: nn.Module, observe: InputOutputObserver) -> None:
        """Call ``observe(x_in, x_out, weight)`` after each forward, x_out = the (first) output ``[B, ..., out]``."""
        self.tokens[name] = 0

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x_out = output[0] if isinstance(output, tuple) else output
            observe(self._counted(name, args, kwargs), x_out, self._weight)

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def on_experts(self, name: str, module: nn.Module, observe: ExpertObserver) -> None:
        """Call ``observe(x, index, weights)`` after each forward of an experts module: the tokens ``[T, D]`` that
        count, with the experts and the weights ``[T, k]`` that the router gave them."""
        self.tokens[name] = 0

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            routed: tuple[Tensor, ...] = args[:3]
            if self._weight is not None:
                counted = (self._weight > 0).repeat_interleave(len(routed[0]) // len(self._weight))
                routed = tuple(part[counted] for part in routed)
            self.tokens[name] += len(routed[0])
            observe(*routed)

        self._handles.append(module.register_forward_hook(hook))

    def remove(self) -> None:
        """Remove every hook; the token counts stay."""
        while self._handles:
            self._handles.pop().remove()

    def finish(self, expected: int) -> None:
        """Remove every hook; every hooked module must have seen exactly ``expected`` counted tokens in this process.

        Raises:
            RuntimeError: naming each module that did not, with its count; or nothing was hooked.
        """
        self.remove()
        wrong = [f"{name} saw {tokens:,}" for name, tokens in self.tokens.items() if tokens != expected]
        if wrong or not self.tokens:
            raise RuntimeError(
                f"The calibration pass should have shown {expected:,} tokens to every hooked module, "
                f"but {'; '.join(wrong) or 'no module was hooked'}."
            )

    def _counted(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        # transformers passes hidden states by position to layers and linears, by name to attention.
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        samples = len(x) if self._counted_samples is None else self._counted_samples
        self.tokens[name] += samples * math.prod(x.shape[1:-1])
        return x
