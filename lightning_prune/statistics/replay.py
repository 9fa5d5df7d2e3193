"""Run decoder layers one at a time: embeddings, masks and rotary tables once, then any layer from any state."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_prune.surgery.anatomy import LayerAnatomy


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

    def attend(self, view: LayerAnatomy, hidden: Tensor) -> Tensor:
        """The residual stream ``[B, L, D]`` between the layer's attention and its MLP; the MLP is not computed."""
        with _replaced_forward([view.mlp], torch.zeros_like):
            return self.run(view.layer, view.index, hidden)

    @staticmethod
    def feed(view: LayerAnatomy, middle: Tensor) -> Tensor:
        """The layer's output ``[B, L, D]`` from the residual stream between its attention and its MLP."""
        result: Tensor = middle + view.mlp(view.mlp_norm(middle))
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
def _replaced_forward(modules: Sequence[nn.Module], stub: Any) -> Iterator[None]:
    for module in modules:
        module.forward = stub  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


class LayerWalk:
    """Takes every batch through the decoder one layer per epoch, each layer as it then is: pruned, once it was pruned.

    ``by_block`` takes two epochs per layer: its attention, then its MLP on what the pruned attention puts out. Holds
    the residual stream of every batch, num_samples × seq_len × hidden_size values, and no inner activations.
    """

    def __init__(self, by_block: bool = False) -> None:
        self.by_block = by_block
        self._batches: dict[int, Replay] = {}

    def step(
        self, model: PreTrainedModel, layers: Sequence[LayerAnatomy], epoch: int, batch_idx: int, tokens: Tensor
    ) -> None:
        """Bring the batch to the input of this epoch's layer or block, then run that, for the hooks to see."""
        if batch_idx not in self._batches:
            self._batches[batch_idx] = capture(model, [view.layer for view in layers], tokens)
        batch = self._batches[batch_idx]
        if not self.by_block:
            if epoch > 0:
                batch.hidden = batch.run(layers[epoch - 1].layer, epoch - 1, batch.hidden)
            batch.run(layers[epoch].layer, epoch, batch.hidden)
        elif epoch % 2 == 0:
            if epoch > 0:
                batch.hidden = batch.feed(layers[epoch // 2 - 1], batch.hidden)
            batch.attend(layers[epoch // 2], batch.hidden)
        else:
            batch.hidden = batch.attend(layers[epoch // 2], batch.hidden)
            batch.feed(layers[epoch // 2], batch.hidden)
