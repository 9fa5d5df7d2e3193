"""Blocks that an earlier pruning took out of a layer, as blocks of no units: whatever observes a block finds its
projections there, sees every token pass, and measures nothing."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.models.family import Family
from lightning_prune.models.vocabulary import Block


class NoUnits(nn.Module):
    """A linear layer with a weight ``[0, in]`` or ``[out, 0]``, which is not a parameter: no checkpoint holds it."""

    bias = None
    weight: Tensor

    def __init__(self, in_features: int, out_features: int, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))


class SkippedBlock(nn.Module):
    """A skipped block of ``modeling_pruned``, which adds nothing to the residual stream and keeps the KV cache right,
    with projections of no units."""

    def __init__(
        self, family: Family, block: Block, hidden_size: int, skipped: nn.Module, device: torch.device
    ) -> None:
        super().__init__()
        self.block, self.skipped = block, skipped
        *self.inputs, self.output = dict.fromkeys(getattr(family, role) for role in family.roles_of(block))
        for name in self.inputs:
            setattr(self, name, NoUnits(hidden_size, 0, device))
        setattr(self, self.output, NoUnits(0, hidden_size, device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.skipped(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        inner = torch.stack([getattr(self, name)(hidden) for name in self.inputs]).sum(0)
        output = getattr(self, self.output)(inner)
        return (output, None) if self.block is Block.ATTENTION else output


def fill_skipped(net: Any, family: Family) -> None:
    """Put ``SkippedBlock``s where ``config.per_layer_config`` skips a block, on the device of the model's buffers."""
    device = next(net.buffers(), torch.zeros(0)).device
    for layer, own in zip(net.get_submodule(family.layers), net.config.per_layer_config, strict=True):
        for block in map(Block, own.skip):
            (name,) = family.modules_of(block)
            skipped = getattr(layer, name)
            if not isinstance(skipped, SkippedBlock):
                setattr(layer, name, SkippedBlock(family, block, own.hidden_size, skipped, device))
