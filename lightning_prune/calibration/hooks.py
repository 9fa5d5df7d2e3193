"""The one place where forward hooks are registered, counted and removed."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

InputObserver = Callable[[Tensor, Tensor | None], None]
InputOutputObserver = Callable[[Tensor, Tensor, Tensor | None], None]


class Hooks:
    """Forward hooks that feed statistics. Leaving the ``with`` block, by an exception too, removes them all.

    Example::

        with Hooks() as hooks:
            hooks.on_input("layer 0 output", layer.output, sum_of_squares.update)
            for ids, weight in batches:
                hooks.set_weight(weight)
                model(ids)
            hooks.assert_tokens(num_samples * seq_len)

    Without ``with`` (a Trainer's hooks begin and end in different methods) call ``remove``.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        self._weight: Tensor | None = None
        self._counted_samples: int | None = None

    def __enter__(self) -> "Hooks":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def set_weight(self, weight: Tensor | None) -> None:
        """Sample weights ``[B]`` of the coming forward, handed to every observer: 0 for a sample that only fills up the
        batch, 1 for the others; None when every sample counts."""
        counted = None if weight is None else int((weight > 0).sum())
        everything = weight is None or counted == len(weight)
        self._weight = None if everything else weight
        self._counted_samples = None if everything else counted

    def on_input(self, name: str, module: nn.Module, observe: InputObserver) -> None:
        """Call ``observe(x, weight)`` before each forward of the module, x = its first input ``[B, ..., in]``.

        Raises:
            ValueError: the name is taken.
        """
        self._reserve(name)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _first(args, kwargs)
            self._count(name, x)
            observe(x, self._weight)

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_input_and_output(self, name: str, module: nn.Module, observe: InputOutputObserver) -> None:
        """Call ``observe(x_in, x_out, weight)`` after each forward, x_out = the (first) output ``[B, ..., out]``.

        Raises:
            ValueError: the name is taken.
        """
        self._reserve(name)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = _first(args, kwargs)
            self._count(name, x)
            observe(x, output[0] if isinstance(output, tuple) else output, self._weight)

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Remove every hook; the token counts stay. Harmless when called twice."""
        while self._handles:
            self._handles.pop().remove()

    def assert_tokens(self, expected: int) -> None:
        """Every hooked module saw exactly this many counted tokens in this process.

        Raises:
            RuntimeError: naming each module that did not, with its count; or nothing was hooked.
        """
        wrong = [f"{name} saw {tokens:,}" for name, tokens in self.tokens.items() if tokens != expected]
        if wrong or not self.tokens:
            raise RuntimeError(
                f"The calibration pass should have shown {expected:,} tokens to every hooked module, "
                f"but {'; '.join(wrong) or 'no module was hooked'}."
            )

    def _reserve(self, name: str) -> None:
        if name in self.tokens:
            raise ValueError(f"'{name}' already has a hook; names must be unique.")
        self.tokens[name] = 0

    def _count(self, name: str, x: Tensor) -> None:
        samples = len(x) if self._counted_samples is None else self._counted_samples
        self.tokens[name] += samples * math.prod(x.shape[1:-1])


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states, which ``transformers`` passes by position to layers and linears, by name to attention."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x
