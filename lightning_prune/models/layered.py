"""A causal LM of which one decoder layer at a time is in memory, and the ways to run it."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from lightning_prune.models.checkpoint import Checkpoint, kept_in_fp32
from lightning_prune.models.experts import set_tensor, unroute
from lightning_prune.models.families import LayerStructure, family_of, layer_structures, layers_of
from lightning_prune.models.head import loss_gradient, token_losses
from lightning_prune.models.sources import Prefetching, Source
from lightning_prune.models.stubs import Call, Stub, entering, replaced_forward, silent
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.devices import free_bytes
from lightning_prune.support.memory import give_back_freed_memory, keep_heaps_small

Onload = Literal["model", "layer"]
SHARE = 0.5  # of a device's free memory that the weights may take; calibration needs the rest


class Overflow:
    """Remembers the names of tensors with NaN or infinite values until ``raise_if_any``, without waiting for the device
    after every batch."""

    def __init__(self) -> None:
        self._bad: dict[str, Tensor] = {}

    def watch(self, name: str, values: Tensor) -> None:
        """Take note of ``values`` of any shape; the sum of finite values is finite, and one pass makes it."""
        bad = ~torch.isfinite(values.detach().sum(dtype=torch.float32))
        self._bad[name] = self._bad[name] | bad if name in self._bad else bad

    def forget(self) -> None:
        """Forget the names remembered so far."""
        self._bad.clear()

    def raise_if_any(self) -> None:
        """Raise FloatingPointError that names what overflowed first, in every process where it did in one."""
        first = next((name for name, bad in self._bad.items() if bool(bad)), None)
        self.forget()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            everywhere: list[str | None] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everywhere, first)
            first = next((name for name in everywhere if name is not None), None)
        if first is not None:
            raise FloatingPointError(f"{first}: NaN or infinite values.")


class LayeredModel:
    """Embeddings, final norm and head are always loaded, a decoder layer's weights between ``enter`` and ``leave``.

    Args:
        net: the model on the meta device, its buffers real (``skeleton``).
        source: gives the parameters.
        dtype: of the loaded parameters; None: as stored.
        onload: ``model`` keeps every layer that was entered, ``layer`` drops it in ``leave``.
        head_alone: load the final norm and the head alone, which is all that ``head`` needs.

    Attributes:
        evaluations: layer evaluations so far; a layer's MLP or attention alone counts as one.
        bytes_read: bytes of parameters loaded so far.
        layer_names: of every layer, the name of each parameter below the layer → its name in the model.
        outside: names of the other parameters.
        wide: those that are in fp32 whatever ``dtype``, as in transformers: biases and weights of routers.
        overflow: outputs of layers and head that were not finite.
    """

    def __init__(
        self,
        net: PreTrainedModel,
        source: Source,
        dtype: torch.dtype | None,
        device: torch.device,
        onload: Onload,
        head_alone: bool = False,
    ) -> None:
        self.net, self.dtype, self.device, self.onload = net, dtype, device, onload
        self.config: Any = net.config
        self.family = family_of(net.config)
        self.layers = layers_of(net)
        # The routers' own loss is not part of what is measured.
        self._options = {} if self.family.experts is None else {"output_router_logits": False}
        self.overflow = Overflow()
        self.evaluations = self.bytes_read = 0
        self.change: Callable[[LayerStructure], None] | None = None
        self._reader = Prefetching(source)
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._meta: dict[int, dict[str, nn.Parameter]] = {}  # of the loaded layers
        prefix = self.family.layers
        self.layer_names = [
            {name: f"{prefix}.{index}.{name}" for name, _ in layer.named_parameters()}
            for index, layer in enumerate(self.layers)
        ]
        ends = [net.get_submodule(self.family.final_norm), net.get_output_embeddings()]
        head = {id(parameter) for module in ends for parameter in module.parameters()}
        self.outside = [
            name
            for name, parameter in net.named_parameters()
            if not name.startswith(f"{prefix}.") and (not head_alone or id(parameter) in head)
        ]
        self.wide = kept_in_fp32(net, dtype)
        self._assign(net, dict(zip(self.outside, self.outside, strict=True)))
        for module in net.modules():
            module._buffers |= {name: None if it is None else it.to(device) for name, it in module._buffers.items()}

    @cached_property
    def views(self) -> list[LayerStructure]:
        """The ``layer_structures`` of a dense model; the modules stay the same when weights are loaded and dropped."""
        return layer_structures(self.net)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, L."""
        return len(self.layers)

    # A layer's weights

    def enter(self, index: int) -> nn.Module:
        """Load layer ``index``, unless it is loaded (``is_present``)."""
        layer = self.layers[index]
        if not self.is_present(index):
            meta = dict(layer.named_parameters())
            self._assign(layer, self.layer_names[index])
            self._meta[index] = meta
            if self.change is not None:
                self.change(self.views[index])
        return layer

    def is_present(self, index: int) -> bool:
        """Whether layer ``index`` has its weights."""
        return index in self._meta

    def announce(self, index: int) -> None:
        """Begin to read layer ``index``, the next one."""
        if 0 <= index < len(self.layers) and not self.is_present(index):
            self._reader.announce(self._split(self.layer_names[index].values())[0], self.dtype, self.device)

    def leave(self, index: int, changed: bool = False) -> None:
        """Drop layer ``index``, unless layers stay loaded; a ``changed`` one is dropped all the same."""
        if self.is_present(index) and (self.onload == "layer" or changed):
            if (experts := self.views[index].experts if "views" in self.__dict__ else None) is not None:
                unroute(experts.module)
            meta = self._meta.pop(index)
            added = dict(self.layers[index].named_parameters()).keys() - meta.keys()  # biases that a change brought
            for name, parameter in (dict.fromkeys(added) | meta).items():
                set_tensor(self.layers[index], name, parameter)
            give_back_freed_memory()

    def change_layers(self, change: Callable[[LayerStructure], None] | None) -> None:
        """Drop all layers; from now on each that is loaded is changed by ``change``, None for as it is read."""
        for index in list(self._meta):
            self.leave(index, changed=True)
        self.change = change

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Within the block, layer ``index`` with its weights loaded."""
        try:
            yield self.enter(index)
        finally:
            self.leave(index)

    def load_all(self) -> None:
        """Load every layer, for ``onload model``."""
        for index in range(len(self.layers)):
            self.announce(index)
            self.enter(index)

    @property
    def layer_bytes(self) -> int:
        """Bytes of every layer's weights in the dtype in which they are loaded."""
        size = (self.dtype or self.net.dtype).itemsize
        return sum(parameter.numel() for layer in self.layers for parameter in layer.parameters()) * size

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """Within the block, the whole model: every layer is loaded when it runs, and dropped as in ``leave``."""
        hooks = []
        for index, layer in enumerate(self.layers):

            def before(*_: Any, index: int = index) -> None:
                self.enter(index)
                self.announce(index + 1)

            hooks.append(layer.register_forward_pre_hook(before))
            hooks.append(layer.register_forward_hook(lambda *_, index=index: self.leave(index)))
        try:
            yield self.net
        finally:
            for hook in hooks:
                hook.remove()

    def close(self) -> None:
        """Drop all weights and stop reading."""
        self._reader.close()
        self.change_layers(None)
        self._calls.clear()

    # Running it

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream ``[B, L, D]`` that enters layer 0."""
        seen: list[tuple[Tensor, Call]] = []
        stubs = nn.ModuleList(Stub(layer, seen, self.family.layer_returns) for layer in self.layers)
        path, _, leaf = self.family.layers.rpartition(".")
        owner = self.net.get_submodule(path)
        setattr(owner, leaf, stubs)
        try:
            self.net.base_model(input_ids=tokens, use_cache=False, **self._options)
        finally:
            setattr(owner, leaf, self.layers)
        # Masks and rotary tables of packed sequences depend on the shape alone.
        self._calls.setdefault((tokens.shape[0], tokens.shape[1]), [call for _, call in seen])
        return seen[0][0]

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, L, V]``, layer by layer."""
        hidden = self.embed(tokens)
        for index in range(self.num_layers):
            with self.layer(index):
                self.announce(index + 1)
                hidden = self.run(index, hidden)
        return self.head(hidden)

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Output ``[B, L, D]`` of layer ``index`` for the input ``hidden``, as in the whole model, bit for bit."""
        self.evaluations += 1
        result = self._evaluate(index, hidden)
        self.overflow.watch(f"layer {index}, output", result)
        return result

    def streams(self, index: int, hidden: Tensor) -> list[Tensor]:
        """The residual stream ``[B, L, D]`` before, between and after the layer's blocks, one more than there are. Of
        two blocks side by side the first comes first."""
        if self.views[index].side_by_side:
            return [hidden, self.beside(index, hidden), self.run(index, hidden)]
        with entering(list(self.views[index].parts.values())[1:]) as seen:
            after = self.run(index, hidden)
        return [hidden, *seen, after]

    def run_block(self, index: int, block: Block, hidden: Tensor) -> Tensor:
        """The residual stream ``[B, L, D]`` after one block with the input ``hidden``; the others are not computed."""
        self.evaluations += 1
        result = self._evaluate_to(index, block, self._without(index, block), hidden)
        self.overflow.watch(f"layer {index}, output", result)
        return result

    def run_without(self, index: int, block: Block, hidden: Tensor) -> Tensor:
        """The residual stream ``[B, L, D]`` after the layer whose ``block`` adds nothing."""
        with replaced_forward(silent(self.views[index].parts[block])):
            return self.run(index, hidden)

    def beside(self, index: int, hidden: Tensor) -> Tensor:
        """The residual stream ``[B, L, D]`` after the first of two blocks that both read ``hidden``; ``hidden`` itself
        where blocks come one after another."""
        view = self.views[index]
        return self.run_block(index, view.blocks[0], hidden) if view.side_by_side else hidden

    def scaled(self, index: int, hidden: Tensor) -> Tensor:
        """Scale the stream ``[B, L, D]`` after the layer's last block; most families do not change it."""
        view = self.views[index]
        return hidden if view.scale is None else (hidden * getattr(view.layer, view.scale)).to(hidden.dtype)

    def inner(self, index: int, block: Block, hidden: Tensor) -> Tensor:
        """Inputs of the block's output projection, ``[B, L, n]``, for the input ``hidden``. The projection's hooks see
        it; the product itself, a third of a Llama's layer, is not computed."""
        seen: list[Tensor] = []
        projection = self.views[index].projection(block)

        def stub(inputs: Tensor) -> Tensor:
            seen.append(inputs)
            return hidden.new_zeros(1).expand(*inputs.shape[:-1], projection.weight.shape[0])

        with replaced_forward({**self._without(index, block), projection.module: stub}):
            self.run(index, hidden)
        return seen[0]

    def add(self, index: int, hidden: Tensor, block: Block, output: Tensor, alone: bool = False) -> Tensor:
        """The residual stream after a block with the input ``hidden`` and the output ``output``, ``[B, L, D]`` each,
        through the layer's own norms and multipliers; unless ``alone``, with what a block side by side with it adds.
        Does not count as an evaluation."""
        scale = self.family.mlp_scale(self.config) if block is Block.MLP else None
        output = output if scale is None else output * scale
        stubs = self._without(index, block) if alone or not self.views[index].side_by_side else {}
        part = self.views[index].parts[block]
        (module, pair), *_ = part.modules.items()
        stubs |= silent(part)  # the modules of a block add up
        stubs[module] = lambda *_, **__: (output, None) if pair else output
        return self._evaluate_to(index, block, stubs, hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of residual rows ``[n, D]`` or ``[B, L, D]`` after the last layer, computed by the model
        itself, with its soft caps and scales."""
        norm = self.net.get_submodule(self.family.final_norm)
        rows = hidden if hidden.dim() == 3 else hidden[None]
        decoder = MoeModelOutputWithPast(last_hidden_state=norm(rows))
        decoder.shared_kv_states = None  # which Gemma 4 hands on
        with replaced_forward({self.net.base_model: lambda *_, **__: decoder}):
            logits: Tensor = self.net(inputs_embeds=rows, use_cache=False, return_dict=True, **self._options).logits
        return logits if hidden.dim() == 3 else logits[0]

    def losses(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """``token_losses`` of the residual stream after the last layer."""
        losses = token_losses(self.head, hidden, tokens, self.config.vocab_size)
        self.overflow.watch("head, token losses", losses)
        return losses

    def loss_gradient(self, hidden: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
        """``head.loss_gradient`` of the residual stream after the last layer."""
        gradient = loss_gradient(self.head, hidden, tokens, weight, self.config.vocab_size)
        self.overflow.watch("head, gradient of the loss", gradient)
        return gradient

    def _without(self, index: int, block: Block) -> dict[nn.Module, Any]:
        """Stubs in place of the modules of all other blocks of a layer."""
        others = [part for other, part in self.views[index].parts.items() if other is not block]
        return {module: stub for part in others for module, stub in silent(part).items()}

    def _evaluate_to(self, index: int, block: Block, stubs: dict[nn.Module, Any], hidden: Tensor) -> Tensor:
        """The residual stream after ``block``, as the next one finds it: of the last, or one side by side, the layer's
        output."""
        view = self.views[index]
        later = [] if view.side_by_side else view.blocks[view.blocks.index(block) + 1 :]
        with entering([view.parts[one] for one in later[:1]]) as seen, replaced_forward(stubs):
            after = self._evaluate(index, hidden)
        return seen[0] if seen else after

    def _evaluate(self, index: int, hidden: Tensor) -> Tensor:
        shape = (hidden.shape[0], hidden.shape[1])
        if shape not in self._calls:
            self.embed(torch.zeros(shape, dtype=torch.int64, device=hidden.device))
        args, kwargs = self._calls[shape][index]
        output = self.layers[index](hidden, *args, **kwargs)
        for value in kwargs.values():
            if isinstance(value, MutableMapping):  # in which Gemma 4 hands keys and values on to no one
                value.clear()
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    # Parameters

    def _split(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Names of parameters in ``dtype``, and of those in fp32."""
        names = list(names)
        return [name for name in names if name not in self.wide], [name for name in names if name in self.wide]

    def _assign(self, module: nn.Module, names: dict[str, str]) -> None:
        own, wide = self._split(names.values())
        read = self._reader.read(own, self.dtype, self.device)
        if wide:
            read |= self._reader.read(wide, torch.float32, self.device)
        self.bytes_read += sum(tensor.numel() * tensor.element_size() for tensor in read.values())
        shared: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            shared.setdefault(id(parameter), []).append(name)
        for name, stored in names.items():
            new = nn.Parameter(read[stored], requires_grad=False)
            for alias in shared[id(module.get_parameter(name))]:  # tied embeddings stay tied
                set_tensor(module, alias, new)


def open_layered(
    checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device, onload: Onload = "layer"
) -> LayeredModel:
    """A dense or pruned checkpoint as a ``LayeredModel``; no layer is read yet."""
    keep_heaps_small()
    return LayeredModel(checkpoint.skeleton(), checkpoint.source(), dtype, device, onload)


def open_head(checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device) -> LayeredModel:
    """The final norm and the head of a checkpoint; no layer can run."""
    return LayeredModel(checkpoint.skeleton(), checkpoint.source(), dtype, device, "layer", head_alone=True)


def choose_onload(wish: str, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Onload:
    """``auto`` becomes ``model`` where the weights take at most half of the free memory, ``layer`` elsewhere."""
    if wish in get_args(Onload):
        return wish  # type: ignore[return-value]
    elements = sum(torch.Size(entry.shape).numel() for entry in checkpoint.tensors.values())
    return "model" if elements * dtype.itemsize <= SHARE * free_bytes(device) else "layer"
