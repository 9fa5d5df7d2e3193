"""Prune large language models with PyTorch Lightning and compare the methods fairly."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lightning_prune.python.calibration import calibration_set
    from lightning_prune.python.commands import apply, compare, evaluate, prune
    from lightning_prune.python.pruned import PrunedModel
    from lightning_prune.support.errors import UserError

__version__ = "0.1.0"
__all__ = [
    "PrunedModel",
    "UserError",
    "__version__",
    "apply",
    "calibration_set",
    "compare",
    "evaluate",
    "load",
    "prune",
]

_HOME = {  # imported when they are asked for: torch, transformers and Lightning take seconds
    "PrunedModel": "python.pruned",
    "UserError": "support.errors",
    "apply": "python.commands",
    "calibration_set": "python.calibration",
    "compare": "python.commands",
    "evaluate": "python.commands",
    "prune": "python.commands",
}


def load(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a pruned checkpoint (or a dense model) for inference or training, without remote code.

    Args:
        path: folder or hub id; ``demo`` is the embedded model.
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        lightning_prune.support.errors.UserError: nothing to load there, or not a supported model.
    """
    from lightning_prune.models.checkpoint import Checkpoint  # torch and transformers take seconds to import

    return Checkpoint.open(str(path)).load(dtype)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"lightning_prune.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
