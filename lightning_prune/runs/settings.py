"""``compare.yaml`` and the command line, as the list of runs to make."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field

from lightning_prune.methods.target import check_share, kind_of, parse_size
from lightning_prune.runs.build import without_size
from lightning_prune.runs.config_files import config_file, read_config, shipped_folder, shipped_methods
from lightning_prune.runs.folder import REPORTS, check_label
from lightning_prune.support.errors import UserError, did_you_mean
from lightning_prune.support.validation import parse_json

Options = dict[str, Any]
Kind = TypeVar("Kind", bound=BaseModel)
Ratio = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class _Model(BaseModel):
    class_path: str
    init_args: Options = {}


class _System(BaseModel):
    model_config = ConfigDict(extra="allow")  # the parser of runs names what is not known

    model: _Model
    data: Options = {}
    trainer: Options = {}


class Settings(BaseModel):
    """What an experiment runs: ``compare.yaml``, overruled and completed by ``read_settings``."""

    model_config = ConfigDict(extra="forbid")

    systems: Annotated[dict[str, str | Options], Field(min_length=1)]  # label → what fit takes, but the pruning ratio
    ratios: Annotated[list[Ratio], Field(min_length=1)] = [0.2, 0.3, 0.5]
    targets: list[str] = []  # parameters or memory to keep at most, as 4.5B or 6GiB, in place of ratios
    # Draw the calibration samples, one run each; without any, those of the configurations do.
    seeds: list[Annotated[int, Field(ge=0)]] = []
    pretrained: str = "demo"
    root: Path = Path("logs")
    data: Options = {}
    trainer: Options = {}

    @property
    def show_progress(self) -> bool:
        """Whether the experiment shows its own, in place of every run's."""
        return self.trainer.get("enable_progress_bar", True) is not False

    def configuration(self, label: str, size: float | str, seed: int | None = None) -> Options:
        """The configuration of one run; ``size``: a ratio or a target; ``seed`` overrides that of ``data``."""
        configuration = deepcopy(self.systems[label])
        assert isinstance(configuration, dict)  # as read_settings completes them
        option = f"target_{kind_of(size)}" if isinstance(size, str) else "pruning_ratio"
        configuration["model"]["init_args"] = without_size(configuration["model"]["init_args"]) | {option: size}
        if seed is not None:
            configuration["data"]["seed"] = seed
        return configuration


def read_settings(
    path: Path,
    root: Path | None = None,
    pretrained: str | None = None,
    ratios: Sequence[float] | None = None,
    systems: Sequence[str] | None = None,
    options: Mapping[str, str] | None = None,
    seeds: Sequence[int] | None = None,
    targets: Sequence[str] | None = None,
) -> Settings:
    """Read the file at ``path``, or the shipped one of that name; what is not None overrules it.

    ``systems``: only these labels of the file, names of methods, or files of systems. ``options``: ``data.OPTION`` and
    ``trainer.OPTION`` with values as on the command line; a system's own ``data`` section (ShortGPT's second setting)
    still comes last, since it is what makes that system. ``targets`` take the place of the file's ratios.

    Raises:
        UserError: no such file, an unknown key or system, a ratio outside 0 and 1, a seed that is not one.
    """
    named_as, path = path, config_file(path)
    given = {"root": root and str(root), "pretrained": pretrained, "ratios": ratios, "seeds": seeds, "targets": targets}
    for ratio in ratios or ():
        check_share(ratio, "--ratios")
    overrules = {name: value for name, value in given.items() if value is not None}
    subject = f"--config: '{path}'{''.join(f' --{name}' for name in overrules)}"
    content = read_config(path, "--config")
    if "model" in content and "systems" not in content:
        raise UserError(
            f"--config: '{named_as}' is a method, not an experiment. Give --config compare --systems {named_as}."
        )
    file = _validated(content | overrules, Settings, subject)
    chosen = _chosen(file.systems, systems, named_as)
    for label in file.systems | chosen:
        check_label(label, f"--config: systems in '{path}'")
        if label == REPORTS:
            raise UserError(f"--config: '{path}' names a system '{label}', like the folder of reports. Rename it.")
    if file.seeds and "data.seed" in (options or {}):
        raise UserError("--data.seed: the experiment has --seeds, which mean the same. Leave one of them out.")
    shared = {"data": file.data, "trainer": file.trainer}
    for name, text in (options or {}).items():
        shared = _merged(shared, _nested(name, text))
    complete: dict[str, Options] = {}
    for label, system in chosen.items():
        complete[label] = _merged(shared, _system(label, system, path.parent))
        complete[label]["model"]["init_args"] |= {"pretrained": file.pretrained, "label": label}
        # Of the whole experiment instead of every run's.
        complete[label]["trainer"] |= {"enable_progress_bar": False, "default_root_dir": str(file.root)}
    for text in file.targets:
        parse_size(text, kind_of(text), "--targets")
    distinct = {"ratios": sorted(set(file.ratios)), "seeds": sorted(set(file.seeds))}
    return file.model_copy(update={"systems": complete, **shared, **distinct})


def _chosen(known: dict[str, str | Options], names: Sequence[str] | None, file: Path) -> dict[str, str | Options]:
    """The systems called ``names``, all ``known`` ones for None; others are files of systems or methods."""
    if names is None:
        return known
    shipped, chosen = shipped_methods(), dict[str, str | Options]()
    for name in dict.fromkeys(names):
        own = name.endswith((".yaml", ".yml"))
        label = Path(name).stem if own else name
        if label in chosen or (own and label in known):
            raise UserError(f"--systems: '{name}' would be a second system '{label}'. Rename the file.")
        if own:
            chosen[label] = str(Path(name).absolute())
        elif name in known:
            chosen[name] = known[name]
        elif name in shipped:
            chosen[name] = str(shipped_folder() / f"{name}.yaml")
        else:
            raise UserError(
                f"--systems: no system '{name}' in '{file}', and no such method."
                f"{did_you_mean(name, [*known, *shipped])} Systems: {', '.join(known)}. Methods: {', '.join(shipped)}."
            )
    return chosen


def _system(label: str, given: str | Options, folder: Path) -> Options:
    """``given`` is the path of a method's file, or a mapping that may name one under ``config`` and overrides it."""
    own: Options = {"config": given} if isinstance(given, str) else dict(given)
    option, base = f"systems.{label}", {}
    if "config" in own:
        file = own.pop("config")
        if not isinstance(file, str):
            raise UserError(f"--config: {option}.config is {file!r}. Give the path of a method's file.")
        base = read_config(config_file(file, folder, option), option)
    return _validated(_merged(base, own), _System, f"--config: system '{label}'").model_dump()


def _validated(given: Options, kind: type[Kind], subject: str) -> Kind:
    try:
        text = json.dumps(given, default=str)
    except TypeError as error:  # a date as a key
        raise UserError(f"{subject} is not valid: {error}.") from None
    return parse_json(text.encode(), kind, subject)


def _nested(name: str, text: str) -> Options:
    """``data.seed`` and ``3``, which is written as in YAML, as ``{"data": {"seed": 3}}``."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--{name}: found {text!r}, which is not YAML ({' '.join(str(error).split())}).") from None
    for key in reversed(name.split(".")):
        value = {key: value}
    return dict(value)


def _merged(base: Options, over: Options) -> Options:
    """``over`` wins key by key; mappings are merged."""
    merged = deepcopy(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else deepcopy(value)
    return merged
