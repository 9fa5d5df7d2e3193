"""The facts that decide a run's result: by them a finished run is recognised, and an unfinished one continued."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_prune import __version__
from lightning_prune.runs.folder import STARTED, UNFINISHED, RunFolder, runs_below
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import Lock, finite
from lightning_prune.support.validation import read_json

Facts = dict[str, Any]


def configuration_sha256(
    method: str,
    options: dict[str, Any],
    precision: str,
    base_model: str | None,
    calibration: str | None,
    evaluation: dict[str, str],
) -> str:
    """SHA-256 of the canonical configuration, 64 hexadecimal digits.

    ``method`` is a class name, ``options`` are all of it. The others are fingerprints: of the weights, of the
    calibration set (None where no data is read), and by evaluation set.
    """
    facts = {
        "version": __version__,
        "method": method,
        "options": {key: value for key, value in options.items() if key not in ("pretrained", "label", "onload")},
        "precision": precision,
        "base_model": base_model,
        "calibration": calibration,
        "evaluation": evaluation,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


# Decide nothing: placement, batches (sums are free of their size but for rounding), and how model and text are called,
# of which there are fingerprints.
FREE = (
    *("model.label", "model.onload", "model.pretrained"),
    *("data.tokenizer", "data.dataset", "data.batch_size", "data.cache_dir", "data.continuations"),
)


def facts_of(config: dict[str, Any], base_model: str | None, calibration: str | None, processes: int) -> Facts:
    """Facts that decide a result: options by name, and fingerprints of what was read."""
    options = {f"model.{name}": value for name, value in config["model"].get("init_args", {}).items()}
    options |= {f"data.{name}": value for name, value in config.get("data", {}).items() if not name.startswith("eval")}
    return {
        "model": config["model"]["class_path"],
        **{name: value for name, value in options.items() if name not in FREE},
        "trainer.precision": config.get("trainer", {}).get("precision") or "32-true",
        "weights of the model (SHA-256)": base_model,
        "calibration tokens (SHA-256)": calibration,
        "processes": processes,
    }


def differences(before: Facts, now: Facts) -> list[str]:
    """Facts that differ, with both values; ``before`` is from JSON, and may hold more that decided nothing."""
    now = json.loads(json.dumps(finite(now)))
    return [f"{name}: {before.get(name)} then, {now[name]} now" for name in now if before.get(name) != now[name]]


def unfinished_run(root: Path, label: str, facts: Facts) -> Path:
    """The newest unfinished run of the same configuration below ``<root>/<label>``; one that is still under way only
    if it is the only one, for ``RunFolder.claim`` to refuse. None: UserError, with what others differ in."""
    others, alive = [], None
    for path in reversed(runs_below(root / label)):
        before: Facts = {}
        with suppress(UserError):
            before = read_json(path / STARTED, Facts, "--resume")
        if not before or RunFolder(path).is_finished or not (path / UNFINISHED).exists():
            continue
        if different := differences(before, facts):
            others.append(f"{path.name} differs in {'; '.join(different)}.")
        elif (lock := Lock.take(path / UNFINISHED)) is not None:
            lock.release()
            return path
        else:
            alive = path
    if alive is None:
        raise UserError(
            f"--resume: no unfinished run of this configuration below '{root / label}'. "
            f"{' '.join(others) or 'There is none at all.'} Leave --resume out to start again."
        )
    return alive
