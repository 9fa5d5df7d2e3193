"""Prune large language models with PyTorch Lightning and compare the methods fairly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a pruned checkpoint (or a dense model) for inference or training, without remote code.

    Args:
        path: folder or hub id; ``demo`` is the embedded model.
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        lightning_prune.errors.UserError: nothing to load there, or not a supported model.
    """
    from lightning_prune.models.loading import load_model  # torch and transformers take seconds to import

    return load_model(str(path), dtype)
