"""What ``tune`` shows in TensorBoard: the loss of every trial, and what the first and the best keep of every layer."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lightning_prune.runs.tune import Tuned


def log_trial(writer: SummaryWriter, found: Tuned) -> None:
    """The newest trial, and the best so far, to be seen at once; the step is the trial's number."""
    writer.add_scalar("held-out loss/trial", found.trials[-1].loss, len(found.trials))
    writer.add_scalar("held-out loss/best so far", found.best.loss, len(found.trials))
    writer.flush()


def log_kept(folder: Path, found: Tuned) -> None:
    """Kept fraction of both blocks, a run for the first trial and one for the best; the step is the layer."""
    for name, trial in (("first", found.trials[0]), ("best", found.best)):
        with SummaryWriter(str(folder / name)) as writer:
            for block, shares in trial.kept.items():
                for layer, share in enumerate(shares):
                    writer.add_scalar(f"kept fraction/{block}", share, layer)
