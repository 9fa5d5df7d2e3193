"""``compare.yaml`` and the command line, as the list of runs to make."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.runs.config_files import check_file
from lightning_prune.runs.folder import REPORTS, check_label
from lightning_prune.runs.shipped_configs import config_file
from lightning_prune.support.errors import UserError

ALLOWED = ("pretrained", "ratios", "seeds", "systems", "data", "trainer", "root")
DEFAULT_RATIOS = (0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Settings:
    """What an experiment runs. ``systems`` maps a label to a complete configuration but for the pruning ratio, with
    the sections ``model``, ``data`` and ``trainer`` that ``lightning-prune fit`` takes. ``seeds`` draw the calibration
    samples, one run each; without any, those of the configurations do."""

    ratios: list[float]
    systems: dict[str, dict[str, Any]]
    root: Path
    seeds: list[int] = field(default_factory=list)
    show_progress: bool = True

    def configuration(self, label: str, ratio: float, seed: int | None = None) -> dict[str, Any]:
        """The configuration of one run; ``seed`` of its calibration samples overrules its own."""
        found = deepcopy(self.systems[label])
        found["model"]["init_args"]["pruning_ratio"] = ratio
        if seed is not None:
            found["data"]["seed"] = seed
        return found


def read_settings(
    path: Path,
    root: Path | None = None,
    pretrained: str | None = None,
    ratios: Sequence[float] | None = None,
    systems: Sequence[str] | None = None,
    options: Mapping[str, str] | None = None,
    seeds: Sequence[int] | None = None,
) -> Settings:
    """Read the file; what is not None overrules it.

    Args:
        path: the YAML file, or the name of a shipped one.
        root, pretrained, ratios: overrule the file's.
        systems: only these labels of the file.
        options: ``data.OPTION`` and ``trainer.OPTION`` with values as on the command line. A system's own ``data``
            section (ShortGPT's second setting) still comes last: it is what makes that system.
        seeds: overrule the file's; they apply to every system.

    Raises:
        UserError: no such file, an unknown key, system or ratio, a seed that is none.
    """
    path = config_file(path)
    file = _yaml(path, "--config")
    unknown = sorted(file.keys() - set(ALLOWED))
    if unknown:
        raise UserError(f"--config: '{path}' has the key '{unknown[0]}'. Allowed: {', '.join(ALLOWED)}.")
    found = file.get("systems")
    if not isinstance(found, dict) or not found:
        raise UserError(f"--config: '{path}' lists no systems. Give systems: {{label: file of a method}}.")
    for label in found:
        check_label(label, f"--config: systems in '{path}'")
        if label == REPORTS:
            raise UserError(
                f"--config: a system in '{path}' is called '{label}', as the folder of reports is. Rename it."
            )
    drawn = _seeds(file.get("seeds", []) if seeds is None else seeds)
    if drawn and "data.seed" in (options or {}):
        raise UserError("--data.seed: the experiment has --seeds, which say the same. Leave one of them out.")
    labels = list(found) if systems is None else list(dict.fromkeys(systems))
    missing = [label for label in labels if label not in found]
    if missing:
        raise UserError(f"--systems: '{path}' has no system '{missing[0]}'. Systems: {', '.join(found)}.")
    shared: dict[str, dict[str, Any]] = {section: _section(file, section, path) for section in ("trainer", "data")}
    for name, value in (options or {}).items():
        section, _, option = name.partition(".")
        _set(shared[section], option.split("."), _value(name, value))
    folder = Path(_text(file, "root", path) or "logs") if root is None else root
    model = {"pretrained": _text(file, "pretrained", path) or "demo" if pretrained is None else pretrained}
    show_progress = shared["trainer"].get("enable_progress_bar", True) is not False
    # Of the whole experiment instead of every run's.
    shared["trainer"] |= {"enable_progress_bar": False, "default_root_dir": str(folder)}
    return Settings(
        ratios=_ratios(file.get("ratios", DEFAULT_RATIOS) if ratios is None else ratios),
        systems={label: _system(label, found[label], path.parent, shared, model) for label in labels},
        root=folder,
        seeds=drawn,
        show_progress=show_progress,
    )


def _system(
    label: str, given: Any, folder: Path, shared: dict[str, dict[str, Any]], model: dict[str, Any]
) -> dict[str, Any]:
    """``given`` is the path of a method's file, or a mapping that may name one under ``config`` and overlays it."""
    if isinstance(given, str):
        given = {"config": given}
    if not isinstance(given, dict):
        raise UserError(f"--config: system '{label}' is {given!r}. Give the path of a method's file, or a mapping.")
    _check_sections(given, f"--config: system '{label}'")
    overlay = {key: value for key, value in given.items() if key != "config"}
    option, own = f"systems.{label}", overlay
    if "config" in given:
        if not isinstance(given["config"], str):
            raise UserError(f"--config: {option}.config is {given['config']!r}. Give the path of a method's file.")
        base = _yaml(config_file(given["config"], folder, option), option)
        _check_sections(base, f"--config: {option}: '{given['config']}'")
        own = _merge(base, overlay)
    if not isinstance(own.get("model"), dict) or "class_path" not in own["model"]:
        raise UserError(f"--config: system '{label}' has no model.class_path, so it is no method.")
    own["model"] = {"class_path": own["model"]["class_path"], "init_args": dict(own["model"].get("init_args") or {})}
    own["model"]["init_args"] |= model | {"label": label}
    found = _merge(shared, own)
    found["trainer"]["default_root_dir"] = shared["trainer"]["default_root_dir"]  # of the whole experiment
    return found


def _check_sections(given: dict[str, Any], subject: str) -> None:
    """Raise UserError where options are expected and something else stands."""
    model = given.get("model")
    sections = {name: given.get(name) for name in ("model", "data", "trainer")}
    sections["model.init_args"] = model.get("init_args") if isinstance(model, dict) else None
    for name, found in sections.items():
        if not isinstance(found, dict | None):
            raise UserError(f"{subject}: {name} is {found!r}. Give options as a mapping, such as {{seed: 0}}.")


def _ratios(given: Any) -> list[float]:
    try:
        ratios = sorted({float(ratio) for ratio in given})
    except (TypeError, ValueError):
        raise UserError(f"--ratios: found {given!r}; give numbers between 0 and 1, such as 0.2 0.3 0.5.") from None
    wrong = [ratio for ratio in ratios if not 0 < ratio < 1]
    if wrong or not ratios:
        found = f"{wrong[0]:g}" if wrong else "none"
        raise UserError(f"--ratios: found {found}; a ratio is a share of all parameters between 0 and 1.")
    return ratios


def _seeds(given: Any) -> list[int]:
    if not isinstance(given, list | tuple) or any(isinstance(one, bool) or not isinstance(one, int) for one in given):
        raise UserError(f"--seeds: found {given!r}; give whole numbers, such as 0 1 2.")
    if any(one < 0 for one in given):
        raise UserError(f"--seeds: found {min(given)}; a seed is 0 or greater.")
    return sorted(set(given))


def _section(file: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    found = file.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(f"--config: '{name}' in '{path}' is {found!r}. Give options as a mapping, such as {{seed: 0}}.")
    return deepcopy(found)


def _text(file: dict[str, Any], name: str, path: Path) -> str | None:
    found = file.get(name)
    if not isinstance(found, str | None):
        raise UserError(f"--config: '{name}' in '{path}' is {found!r}. Give a name or a path.")
    return found


def _value(name: str, text: str) -> Any:
    """A value of the command line, which is written as in YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--{name}: found {text!r}, which is not YAML ({' '.join(str(error).split())}).") from None


def _yaml(path: Path, option: str) -> dict[str, Any]:
    check_file(path, option)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: '{path}' cannot be read ({getattr(error, 'strerror', error)}).") from None
    except yaml.YAMLError as error:
        raise UserError(f"{option}: '{path}' is not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(found, dict):
        raise UserError(f"{option}: '{path}' holds no mapping of options.")
    return found


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` wins key by key; mappings are merged."""
    found = deepcopy(base)
    for key, value in over.items():
        old = found.get(key)
        found[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else deepcopy(value)
    return found


def _set(section: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        section = section.setdefault(key, {})
    section[keys[-1]] = value
