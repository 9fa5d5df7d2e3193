"""One name for everything that decides a run's result, so that a finished run is recognised and not made twice."""

import hashlib
import json
from typing import Any

from lightning_prune import __version__


def configuration_sha256(
    method: str,
    options: dict[str, Any],
    precision: str,
    base_model: str | None,
    calibration: str | None,
    evaluation: dict[str, str],
) -> str:
    """SHA-256 of the canonical configuration, 64 hexadecimal digits.

    Args:
        method: class name.
        options: all its options, defaults included; the model's path and the label do not count.
        base_model: ``base_model_sha256`` or, without one, the name of the model.
        calibration: fingerprint of the calibration set; None for a method that reads no data.
        evaluation: fingerprint by evaluation set.
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
