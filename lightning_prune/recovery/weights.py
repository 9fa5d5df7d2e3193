"""What is trained: adapters or all weights, with zeros of mask pruning that stay zero; and the trained checkpoint."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.checkpoint.whole import why_text_alone
from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import layers_of
from lightning_prune.models.layered import LayeredModel
from lightning_prune.support.devices import CPU
from lightning_prune.support.errors import CheckpointError, UserError
from lightning_prune.support.quiet import quiet_transformers


def linears_of(net: nn.Module) -> dict[str, nn.Linear]:
    """Every linear of the decoder layers by its name in the model: what LoRA adapts and masks zero."""
    prefix = next(name for name, module in net.named_modules() if module is layers_of(net))
    modules = layers_of(net).named_modules(prefix=prefix)
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


def attach_adapters(net: Any, rank: int, keep_zeros: bool = False) -> Any:
    """Freeze ``net`` and add 2·B·A of rank r to every linear of its layers (Hu et al. 2021), with ``keep_zeros`` not to
    weights that are zero; B starts at zero. Returns peft's model around ``net``, whose ``merge_and_unload`` merges.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import Linear
    except ImportError:
        raise UserError(
            "--model.train lora needs the package peft. Install it in the clone, pip install '.[recover]', or choose "
            "--model.train all."
        ) from None

    class MaskedLinear(Linear):  # type: ignore[misc]
        """A LoRA linear that runs as if it were merged, so that single weights can stay zero."""

        def get_delta_weight(self, adapter: str) -> Tensor:
            added: Tensor = super().get_delta_weight(adapter)
            kept: Tensor = self.get_base_layer().weight != 0
            return added * kept

        def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            base = self.get_base_layer()
            added = self.get_delta_weight(self.active_adapters[0])
            return functional.linear(hidden, base.weight + added.to(base.weight.dtype), base.bias)

    # peft takes names by their ends; a regular expression takes them whole.
    targets = "|".join(name.replace(".", r"\.") for name in linears_of(net))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=f"({targets})", bias="none")
    if keep_zeros:
        config._register_custom_module({nn.Linear: MaskedLinear})
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks a per-layer config for global widths, which it does not use
        return get_peft_model(net, config)


def zeros_of(net: nn.Module) -> dict[str, Tensor]:
    """Masks of the zero weights of every linear of the decoder layers: bool ``[out, in]``."""
    return {name: linear.weight.detach() == 0 for name, linear in linears_of(net).items()}


def hold_zeros(net: nn.Module, zeros: Mapping[str, Tensor]) -> None:
    """Stop gradients at ``zeros``. A zero without a gradient stays one in every optimizer that starts from zero
    moments, and weight decay takes nothing from it."""
    for name, zero in zeros.items():
        weight: Any = net.get_submodule(name).weight
        weight.register_hook(lambda grad, zero=zero: grad.masked_fill(zero.to(grad.device), 0))


def count_zeros(net: nn.Module, zeros: Mapping[str, Tensor]) -> int:
    """Count the weights that mask pruning zeroed and check that they are still zero.

    Raises:
        CheckpointError: one of them is not.
    """
    for name, linear in linears_of(net).items():
        if lost := int(linear.weight[zeros[name].to(linear.weight.device)].count_nonzero()):
            raise CheckpointError(f"{lost} weights of {name} that pruning had zeroed are no longer zero")
    return sum(int(mask.sum()) for mask in zeros.values())


class StateSource:
    """Gives parameters that are in memory, see ``models.sources.Source``."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def read(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """Read parameters from memory, see ``models.sources.Source``."""
        return {name: self.state[name].to(device=device, dtype=dtype) for name in names}


def write_recovered(state: Mapping[str, Tensor], pruned: Checkpoint, folder: Path, card: str) -> dict[str, Any]:
    """Write the parameters ``state`` with the config, tokenizer, modeling file and dtype of the ``pruned``
    model, a layer at a time, and what that holds beside its text model. Returns and raises what ``checkpoint.write``
    does."""
    whole = not why_text_alone(pruned, pruned.config, [])  # of a folder as it is, whatever layers were removed before
    with closing(LayeredModel(pruned.skeleton(), StateSource(state), pruned.stored_dtype, CPU, "layer")) as model:
        return write_checkpoint(model, folder, beside=pruned, card=card, whole=whole)
