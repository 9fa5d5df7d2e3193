"""Training a pruned model: LoRA or all weights, on text, with the dense model as a teacher."""

from lightning_prune.recovery.data import RecoveryDataModule
from lightning_prune.recovery.module import Recovery

__all__ = ["Recovery", "RecoveryDataModule"]
