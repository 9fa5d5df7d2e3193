"""Modules that run in place of a layer, or of a block that is left out."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_prune.models.families import BlockStructure

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Stub(nn.Module):
    """Replaces a decoder layer whose hooks must not fire: passes the residual stream on and notes the call."""

    def __init__(self, layer: nn.Module, seen: list[tuple[Tensor, Call]], returns: int) -> None:
        super().__init__()
        self._layer, self._seen, self._returns = [layer], seen, returns  # in a list, so that it is not a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"][0], name)  # such as attention_type, by which a family picks its mask

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._seen.append((hidden_states, (args, kwargs)))
        return (hidden_states, None)[: self._returns] if self._returns else hidden_states


@contextmanager
def replaced_forward(stubs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Within the block, modules run other functions as their forwards."""
    for module, stub in stubs.items():
        module.forward = stub
    try:
        yield
    finally:
        for module in stubs:
            del module.forward


@contextmanager
def entering(parts: Iterable[BlockStructure]) -> Iterator[list[Tensor]]:
    """The residual streams ``[B, L, D]`` that enter these blocks inside, in the order of execution."""
    seen: list[Tensor] = []
    handles = [part.entry.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for part in parts]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def silent(part: BlockStructure) -> dict[nn.Module, Any]:
    """Stubs in place of the modules of a block: zeros of the shape of the input, which take no memory."""
    return {module: partial(_nothing, pair) for module, pair in part.modules.items()}


def _nothing(pair: bool, *args: Any, **kwargs: Any) -> Any:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    zeros = hidden.new_zeros(1).expand_as(hidden)
    return (zeros, None) if pair else zeros
