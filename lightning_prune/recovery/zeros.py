"""Mask pruning left zeros in the projections; training must leave them there."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_prune.models.families import layers_of
from lightning_prune.support.errors import CheckpointError


def linears_of(net: nn.Module) -> dict[str, nn.Linear]:
    """Every linear of the decoder layers by its name in the model: what LoRA adapts and masks zero."""
    prefix = next(name for name, module in net.named_modules() if module is layers_of(net))
    return {
        name: module
        for name, module in net.named_modules()
        if name.startswith(f"{prefix}.") and isinstance(module, nn.Linear)
    }


def kept_weights(net: nn.Module) -> dict[str, Tensor]:
    """Of every linear of the decoder layers, where its weight is not zero: bool ``[out, in]``."""
    return {name: linear.weight.detach() != 0 for name, linear in linears_of(net).items()}


def hold_zeros(net: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Stop gradients at zeroed weights. A zero without a gradient stays one in every optimizer that starts from zero
    moments, and weight decay takes nothing from it."""
    for name, linear in linears_of(net).items():
        if linear.weight.requires_grad:
            mask = kept[name]
            linear.weight.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device))


@torch.no_grad()
def check_zeros(net: nn.Module, kept: Mapping[str, Tensor]) -> int:
    """How many weights are zero because they were.

    Raises:
        CheckpointError: one is not.
    """
    count = 0
    for name, linear in linears_of(net).items():
        zeroed = ~kept[name].to(linear.weight.device)
        lost = int((linear.weight[zeroed] != 0).sum())
        if lost:
            raise CheckpointError(f"{lost} weights of {name} that pruning had zeroed are no longer zero")
        count += int(zeroed.sum())
    return count
