"""Low-rank adapters (Hu et al. 2021) on every linear of the decoder layers, whatever its width, through peft."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.recovery.zeros import linears_of
from lightning_prune.support.errors import UserError
from lightning_prune.support.quiet import quiet_transformers


def attach(net: Any, rank: int, alpha: float, kept: Mapping[str, Tensor] | None = None) -> Any:
    """Freeze ``net`` and add B·A·(alpha / rank) to every linear of its layers; B starts at zero.

    Args:
        net: a causal LM; changed in place.
        rank: r. A linear narrower than that still gets r.
        alpha: numerator of the scale.
        kept: by name of a linear, where the sum B·A may be added (``zeros.kept_weights``); None: everywhere.

    Returns:
        peft's model around ``net``.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError(
            "--model.train lora needs peft. Install it with: pip install 'lightning-prune[recover]', or choose "
            "--model.train all."
        ) from None
    linears = linears_of(net)
    # peft takes names by their ends; a regular expression takes them whole.
    targets = "|".join(name.replace(".", r"\.") for name in linears)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=f"({targets})", bias="none")
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks a per-layer config for global widths, which it does not use
        adapted = get_peft_model(net, config)
    if kept is not None:
        for name in linears:
            layer: Any = net.get_submodule(name)
            layer.forward = partial(_masked, layer, kept[name])
    return adapted


@torch.no_grad()
def merge(adapted: Any, kept: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Add the adapters to the weights and take peft out of the model again; zeroed weights are left as they are."""
    net: nn.Module = adapted.get_base_model()
    if kept is not None:
        for name in kept:
            del net.get_submodule(name).forward
    net = adapted.merge_and_unload()
    if kept is not None:
        for name, linear in linears_of(net).items():
            linear.weight.mul_(kept[name].to(linear.weight))
    return net


def _masked(layer: Any, kept: Tensor, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    """peft's layer as if it were merged: its own sum of two products cannot leave single weights out."""
    base = layer.get_base_layer()
    added = layer.get_delta_weight("default") * kept.to(hidden.device)
    return functional.linear(hidden, base.weight + added.to(base.weight.dtype), base.bias)
