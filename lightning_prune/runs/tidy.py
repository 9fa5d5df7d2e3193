"""What runs leave behind: which folders are finished, which are dead, and which of those are worth keeping."""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from lightning_prune.support.files import Lock, sweep
from lightning_prune.support.names import FINDINGS, PRUNED, TRAINING

UNFINISHED = "unfinished"
STARTED = "started.json"  # what the findings of an unfinished run are made from
METRICS = "metrics.json"
# What a killed run cannot be continued from or learned from.
WORTHLESS = re.compile(
    r"config\.yaml|[0-9.e-]+%|hparams\.yaml|started\.json|unfinished|.*tfevents.*|\..*\.tmp"
    r"|report\.(html|md)|results\.(csv|tex)|precision\.csv|calibration_appendix\.md|tensorboard"
)


def events_folder(ratio: float | None) -> str | None:
    """Where a run's TensorBoard events are, which shows a run under the path to them: ``wanda/version_0/20%``."""
    return None if ratio is None else f"{100 * ratio:.4g}%"


def is_finished(path: Path) -> bool:
    """Whether the run came to its end: ``metrics.json`` is written last."""
    return (path / METRICS).is_file()


def leftovers(path: Path) -> list[str]:
    """Names of what an unfinished run leaves that may still be of use: scores, a plan, a checkpoint, findings."""
    names = sorted(name for name in os.listdir(path) if not WORTHLESS.fullmatch(name))
    states = {FINDINGS: "step_*.safetensors", TRAINING: "*.ckpt"}
    return [name for name in names if name not in states or any((path / name).glob(states[name]))]


def version(name: str) -> int:
    """N of ``version_N``; -1 for any other name."""
    return int(name[8:]) if re.fullmatch(r"version_[0-9]{1,18}", name) else -1


def runs_below(parent: Path) -> list[Path]:
    """The ``version_N`` folders in ``parent``, by number."""
    try:
        found = [entry for entry in parent.iterdir() if version(entry.name) >= 0 and entry.is_dir()]
    except OSError:
        return []
    return sorted(found, key=lambda entry: version(entry.name))


def sweep_runs(parent: Path) -> None:
    """Tidy up after killed runs in ``parent``: their temporary files, and their folders where those are of no use.

    An unfinished folder is of no use when it holds nothing but its configuration and events, or when a finished run has
    the same configuration. Folders of runs that live and folders that are not ours are not touched.
    """
    sweep(parent)
    for path in runs_below(parent):
        for place in (path, path / FINDINGS, *(path / FINDINGS).glob("stage_*"), path / PRUNED):
            sweep(place)
        with suppress(OSError):
            if not (path / UNFINISHED).exists():
                if not any(path.iterdir()):
                    path.rmdir()  # killed, or about to be claimed: then the claimant takes the next number
            elif (lock := Lock.take(path / UNFINISHED)) is not None:
                try:
                    if is_finished(path):
                        forget_findings(path)
                        lock.remove()
                    elif not leftovers(path) or _is_superseded(path):
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    lock.release()


def forget_findings(path: Path) -> None:
    """Remove what only a run that goes on needs."""
    for name in (FINDINGS, TRAINING):
        shutil.rmtree(path / name, ignore_errors=True)
    (path / STARTED).unlink(missing_ok=True)


def _is_superseded(path: Path) -> bool:
    config = path / "config.yaml"
    others = [other / "config.yaml" for other in runs_below(path.parent) if other != path and is_finished(other)]
    return config.is_file() and any(other.is_file() and other.read_bytes() == config.read_bytes() for other in others)
