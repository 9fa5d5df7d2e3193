"""Whether a model's weights stay on the device or come and go layer by layer."""

from typing import get_args

import torch

from lightning_prune.models.checkpoint_files import open_checkpoint
from lightning_prune.models.layered import Onload
from lightning_prune.models.loading import resolve
from lightning_prune.support.memory import free_bytes

SHARE = 0.5  # of a device's free memory that the weights may take; calibration needs the rest


def choose_onload(wish: str, pretrained: str, dtype: torch.dtype, device: torch.device) -> Onload:
    """``auto`` becomes ``model`` where the weights take at most half of the free memory, ``layer`` elsewhere."""
    if wish in get_args(Onload):
        return wish  # type: ignore[return-value]
    files = open_checkpoint(resolve(pretrained))
    weights = sum(_elements(entry.shape) for entry in files.tensors.values()) * dtype.itemsize
    return "model" if weights <= SHARE * free_bytes(device) else "layer"


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
