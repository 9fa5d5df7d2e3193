"""The trained weights as a checkpoint of the layout that the pruned model had."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import LayeredModel


class StateSource:
    """Gives parameters that are in memory, see ``models.sources.Source``."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def read(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        return {name: self.state[name].to(device=device, dtype=dtype) for name in names}


def write_recovered(state: Mapping[str, Tensor], pruned: Checkpoint, folder: Path, card: str) -> dict[str, Any]:
    """Write the parameters ``state`` with the config, tokenizer, modeling file and dtype of the ``pruned``
    model, a layer at a time. Returns and raises what ``checkpoint.write`` does."""
    net, dtype = pruned.skeleton(), pruned.stored_dtype
    model = LayeredModel(net, StateSource(state), dtype, torch.device("cpu"), "layer")
    try:
        return write_checkpoint(model, folder, beside=pruned, card=card)
    finally:
        model.close()
