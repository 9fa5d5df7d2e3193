"""Run decoder layers one at a time: embeddings, masks and rotary tables once, then any layer from any state."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass
class Replay:
    """One batch on its way through the decoder.

    ``hidden`` is the residual stream ``[B, L, D]`` entering the next layer to run; ``calls[l]`` are the other
    arguments of layer l (masks, rotary tables), kept per layer because layer types may differ.
    """

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Output ``[B, L, D]`` of layer ``index`` for the input ``hidden``, as in the full forward, bit for bit."""
        args, kwargs = self.calls[index]
        output = layer(hidden, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def capture(model: PreTrainedModel, layers: Sequence[nn.Module], tokens: Tensor) -> Replay:
    """Run everything before layer 0 and record what every layer would be called with; no layer is computed.

    Args:
        model: a causal LM.
        layers: its decoder layers in order.
        tokens: ``[B, L]`` int64.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first: list[Tensor] = []

    def stub(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not first:
            first.append(hidden_states)
        calls.append((args, kwargs))
        return hidden_states

    with _replaced_forward(layers, stub):
        model.base_model(input_ids=tokens, use_cache=False)
    return Replay(first[0], calls)


@contextmanager
def _replaced_forward(layers: Sequence[nn.Module], stub: Any) -> Iterator[None]:
    for layer in layers:
        layer.forward = stub  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class LayerWalk:
    """Takes every batch through the decoder one layer per epoch, each layer as it then is: pruned, once it was pruned.

    Holds the residual stream of every batch, num_samples × seq_len × hidden_size values, and no layer's inner
    activations.
    """

    def __init__(self, epochs_per_layer: int = 1) -> None:
        self.epochs_per_layer = epochs_per_layer
        self._batches: dict[int, Replay] = {}

    def step(
        self, model: PreTrainedModel, layers: Sequence[nn.Module], epoch: int, batch_idx: int, tokens: Tensor
    ) -> None:
        """Bring the batch to the input of this epoch's layer, then run that layer, for the hooks to see."""
        index, again = divmod(epoch, self.epochs_per_layer)
        if batch_idx not in self._batches:
            self._batches[batch_idx] = capture(model, layers, tokens)
        batch = self._batches[batch_idx]
        if index > 0 and not again:
            batch.hidden = batch.run(layers[index - 1], index - 1, batch.hidden)
        batch.run(layers[index], index, batch.hidden)
