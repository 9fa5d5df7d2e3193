"""Several processes for calibration: Lightning's DDP without the gradient-synchronising wrapper.

Statistics are sums that are reduced once at the end, so wrapping the model would only cost gradient buckets of its
size, and is refused for a model without trainable parameters.
"""

from lightning.pytorch.strategies import DDPStrategy


class CalibrationDDP(DDPStrategy):
    """Process group, samplers and barriers of DDP; the model stays as it is on every rank."""

    strategy_name = "calibration_ddp"

    def configure_ddp(self) -> None:
        """No wrapper."""
