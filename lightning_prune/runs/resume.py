"""Going on with a run that was killed: which unfinished folder it is, and what may not differ."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.runs.folder import RunFolder
from lightning_prune.runs.tidy import STARTED, UNFINISHED, is_finished, runs_below
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import Lock, finite, write_json
from lightning_prune.support.names import FINDINGS

DENSE = "dense.json"
Facts = dict[str, Any]


def facts_of(config: str, base_model: str | None, calibration: str | None, processes: int) -> Facts:
    """What decides every byte of a result: options by name, and fingerprints of what was read."""
    parsed = yaml.safe_load(config)
    options = {f"model.{name}": value for name, value in parsed["model"].get("init_args", {}).items()}
    options |= {f"data.{name}": value for name, value in parsed.get("data", {}).items() if not name.startswith("eval")}
    free = ("model.label", "model.onload", "data.cache_dir")
    return {
        "model": parsed["model"]["class_path"],
        **{name: value for name, value in options.items() if name not in free},
        "trainer.precision": parsed.get("trainer", {}).get("precision"),
        "weights of the model (SHA-256)": base_model,
        "calibration tokens (SHA-256)": calibration,
        "processes": processes,
    }


def differences(before: Facts, now: Facts) -> list[str]:
    """What does not agree, each with both values; ``before`` was read from JSON."""
    now = json.loads(json.dumps(finite(now)))
    return [
        f"{name}: {before.get(name)} then, {now.get(name)} now"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def write_facts(folder: RunFolder, facts: Facts) -> None:
    """Say in an unfinished run's folder what its findings are made from."""
    write_json(folder.path / STARTED, facts)


def unfinished_run(root: Path, label: str, facts: Facts) -> Path:
    """The newest unfinished run of the same configuration below ``<root>/<label>``.

    Raises:
        UserError: there is none, and what the others differ in; or the only one is still under way.
    """
    others, alive = [], None
    for path in reversed(runs_below(root / label)):
        before = _read_object(path / STARTED)
        if before is None or is_finished(path) or not (path / UNFINISHED).exists():
            continue
        if different := differences(before, facts):
            others.append(f"{path.name} differs in {'; '.join(different)}.")
        elif (lock := Lock.take(path / UNFINISHED)) is not None:
            lock.release()
            return path
        else:
            alive = path
    if alive is not None:
        raise UserError(f"--resume: the run in '{alive}' is still under way. Wait for it, or leave --resume out.")
    raise UserError(
        f"--resume: no unfinished run of this configuration below '{root / label}'. "
        f"{' '.join(others) or 'There is none at all.'} Leave --resume out to begin anew."
    )


def known_dense(folder: RunFolder, fingerprints: Mapping[str, str]) -> dict[str, tuple[float, int]] | None:
    """Perplexity and tokens of the dense model by evaluation set, where the killed run had measured them already."""
    found = _read_object(folder.path / FINDINGS / DENSE)
    if found is None or found.get("evaluation") != dict(fingerprints):
        return None
    return {name: (float(value), int(tokens)) for name, (value, tokens) in found["perplexity"].items()}


def keep_dense(folder: RunFolder, fingerprints: Mapping[str, str], perplexity: Mapping[str, tuple[float, int]]) -> None:
    """Keep them for a run that goes on."""
    (folder.path / FINDINGS).mkdir(exist_ok=True)
    write_json(folder.path / FINDINGS / DENSE, {"evaluation": dict(fingerprints), "perplexity": dict(perplexity)})


def _read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object that one of our own runs wrote; None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
