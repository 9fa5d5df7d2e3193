"""Prune large language models with PyTorch Lightning and compare methods on equal terms."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.api import *  # noqa: F403

__version__ = "0.1.0"
__all__ = ["PrunedModel", "UserError", "apply", "calibration_set", "compare", "evaluate", "export", "load", "prune"]  # noqa: F405


def __getattr__(name: str) -> Any:
    """Import the functions when they are first used: torch, transformers and Lightning take seconds."""
    if name in __all__:
        from lightning_prune import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
