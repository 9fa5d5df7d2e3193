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
    """Gives parameters that are in memory; see ``models.sources.Source``."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def read(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """The parameters ``names``, in ``dtype`` (None: as they are), on ``device``."""
        return {name: self.state[name].to(device=device, dtype=dtype) for name in names}


def write_recovered(
    state: Mapping[str, Tensor], pruned: Checkpoint, folder: Path, dtype: torch.dtype, card: str
) -> dict[str, Any]:
    """Write ``state`` with the config, tokenizer and modeling file of the ``pruned`` model.

    Args:
        state: every parameter by its name in the model.
        pruned: the model that was trained.
        folder: where to.
        dtype: of the weights on disk.
        card: ``README.md``.

    Returns:
        What the self-check compared.

    Raises:
        CheckpointError, FloatingPointError, UserError: see ``checkpoint.write``; nothing is left behind.
    """
    model = LayeredModel(pruned.skeleton(), StateSource(state), dtype, torch.device("cpu"), "layer")
    try:
        return write_checkpoint(model, folder, beside=pruned, card=card)
    finally:
        model.close()
