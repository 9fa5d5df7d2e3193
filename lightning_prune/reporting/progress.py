"""Progress bars that say what is going on: calibration passes and perplexity, not epochs and tests."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar


class RunProgressBar(TQDMProgressBar):
    """Lightning's tqdm bar with this project's words."""

    @property
    def test_description(self) -> str:
        """Bar over one evaluation set."""
        return "perplexity"

    def on_train_epoch_start(self, trainer: L.Trainer, *unused: Any) -> None:
        """Bar over the calibration set; layer-wise methods make many passes."""
        super().on_train_epoch_start(trainer, *unused)
        passes = trainer.fit_loop.max_epochs
        self.train_progress_bar.set_description(f"calibration pass {trainer.current_epoch + 1}/{passes}")

    def get_metrics(self, *unused: Any) -> dict[str, int | str | float | dict[str, float]]:
        """No version number behind the bar."""
        return {}
