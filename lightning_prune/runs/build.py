"""A command line, or a configuration as a mapping, as the objects of a run: trainer, method and data.

The command line, the Python functions and experiments all come through here: the same options make the same run.
"""

import difflib
import importlib
import inspect
import logging
import os
import re
import sys
import traceback
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_prune import methods
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.methods.base import PruningMethod
from lightning_prune.methods.target import SIZES
from lightning_prune.runs.config_files import check_text, read_config, shipped_methods, with_config_files
from lightning_prune.runs.trainer import calibration_trainer
from lightning_prune.support.errors import UserError, did_you_mean, first_line
from lightning_prune.support.progress import Progress

CONFIG = ("--config", "--method")
LARGEST = 2**63 - 1
LARGEST_SEED = 2**32 - 1  # numpy's
_UNKNOWN = r"unrecognized arguments: (\S+)|Group '([\w.]+)' does not accept option '([\w.]+)'|Option '([\w.]+)' is not"
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true, false", "str": "text", "list": "a list"}


class Parser(LightningArgumentParser):
    """Ends a mistake in one message that names the nearest valid option, instead of pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UserError: the method's or datamodule's own where that is the cause, else a plain one."""
        if not self.exit_on_error:  # a parser within the parser, for one class: the outer one reports
            super().error(message, ex)
        owners = {name: _options_of(getattr(methods, name)) for name in methods.__all__}
        chosen = re.search(r"given class_path '([\w.]+)\.(\w+)'", message)
        method = chosen and getattr(sys.modules.get(chosen[1]), chosen[2], None)
        options = set(_options_of(method)) if isinstance(method, type) else set().union(*owners.values())
        options |= {option.lstrip("-") for option in self._option_string_actions}
        raise _user_error_in(ex) or UserError(plain(message, sorted(options), owners)) from None


class RunBuilder(LightningCLI):
    """Parses a command line or a configuration and builds ``trainer``, ``model`` and ``datamodule``.

    ``arguments`` are the words of a command line, or a configuration as a mapping. ``model_class`` is the model, but of
    ``PruningMethod`` a subclass is chosen by ``model.class_path``. ``options`` are further ones of the command, by
    name, with the arguments of ``add_argument``: ``option`` gives their values, the configuration does not hold them.

    Raises:
        UserError: a mistake in the arguments.
    """

    data_class: type[L.LightningDataModule] = CalibrationDataModule
    trainer_maker: ClassVar[Any] = staticmethod(calibration_trainer)

    def __init__(
        self,
        arguments: Sequence[str] | Mapping[str, Any],
        model_class: type[L.LightningModule] = PruningMethod,
        command: str = "fit",
        description: str = "",
        options: Mapping[str, dict[str, Any]] = {},
    ) -> None:
        quiet()
        self._own = dict(options)
        check_one_size(arguments)
        chosen = model_class is PruningMethod
        try:
            super().__init__(
                model_class,
                self.data_class,
                trainer_class=self.trainer_maker,
                subclass_mode_model=chosen,
                save_config_callback=None,
                parser_class=Parser,
                parser_kwargs={
                    "allow_abbrev": False,  # --data.num_sample is a mistake, not num_samples
                    "prog": f"lightning-prune {command}",
                    "usage": f"lightning-prune {command} [--config NAME ...] [--model.OPTION VALUE] "
                    "[--data.OPTION VALUE] [--trainer.OPTION VALUE]",
                    "description": description,
                },
                seed_everything_default=0,
                auto_configure_optimizers=False,
                run=False,
                args=dict(arguments) if isinstance(arguments, Mapping) else with_one_size(with_config_files(arguments)),
            )
        except (TypeError, ValueError) as error:  # jsonargparse's own, or what a constructor raises wrapped in one
            if (known := _user_error_in(error)) is not None:
                raise known from None
            if "jsonargparse" not in traceback.extract_tb(error.__traceback__)[-1].filename:
                raise
            if made := re.search(r"Problem with given class_path '[\w.]*?(\w+)':", str(error)):
                cause: BaseException = error  # a logger's package is missing, or refuses what was given
                while cause.__cause__ is not None:
                    cause = cause.__cause__
                raise UserError(f"--trainer: {made[1]} cannot be made ({first_line(cause)}). See --help.") from None
            given = re.search(r"Given value: (.+)", str(error))  # the innermost comes first
            value = given[1] if given else str(error).partition("\n")[0]
            raise UserError(f"--model, --data or --trainer: {value[:200]} cannot be used. See --help.") from None
        kind = type(self.model)
        if chosen and any(getattr(getattr(kind, name, None), "__isabstractmethod__", False) for name in dir(kind)):
            raise UserError(f"--model: '{kind.__name__}' is not a method. Methods: {', '.join(methods.__all__)}.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the tokenizer to the model, and add the command's own options."""
        parser.link_arguments(f"model.{'init_args.' * self.subclass_mode_model}pretrained", "data.tokenizer")
        for name, how in self._own.items():
            parser.add_argument(f"--{name}", **how)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse what the parser lets through: text that is not UTF-8, numbers too large, null for a value."""
        super().parse_arguments(parser, args)
        kinds: dict[str, Any] = {}  # the parser lets null through for the options of a class that it picks
        if self.subclass_mode_model and (model := self.config.get("model")) is not None:
            module, _, name = model.class_path.rpartition(".")
            kinds = _options_of(getattr(importlib.import_module(module), name))
        for name, value in _leaves("", self.config.as_dict()):
            name = name.replace("init_args.", "")
            option = f"--{name}"
            if value is None and name in kinds and type(None) not in typing.get_args(kinds[name]):
                raise UserError(f"{option}: found null; it needs a value ({inspect.formatannotation(kinds[name])}).")
            if isinstance(value, str):
                check_text(value, option)
            elif isinstance(value, int) and abs(value) > LARGEST:
                raise UserError(f"{option}: found {value}; whole numbers go up to {LARGEST}.")
        if not 0 <= int(self.config.get("seed_everything") or 0) <= LARGEST_SEED:
            raise UserError(
                f"--seed_everything: found {self.config.seed_everything}; it must lie between 0 and {LARGEST_SEED}."
            )

    def instantiate_trainer(self, **_: Any) -> L.Trainer:
        """The trainer of the user's options, with what the run itself brings: progress, unless the options forbid it
        or bring a bar, and TensorBoard below ``<root>/<label>``, unless another logger or none is given."""
        options = dict(self._get(self.config_init, "trainer"))
        label = self.label()  # refuses a bad one, whatever the logger
        if options["logger"] in (None, True):
            options["logger"] = TensorBoardLogger(options["default_root_dir"], name=label, default_hp_metric=False)
        trainer: L.Trainer = self.trainer_maker(**options)
        silent = options["enable_progress_bar"] is False or self.option("quiet")
        if not silent and trainer.progress_bar_callback is None:
            self.model.progress = Progress(shown=trainer.is_global_zero)
            if self.model.progress.shown:
                self.datamodule.show_progress()
        return trainer

    def label(self) -> str:
        """Name of the folder in which run folders of this system are made."""
        return str(self.model.label) if isinstance(self.model, PruningMethod) else "test"

    def option(self, name: str) -> Any:
        """The value of one of the command's own options; None where it has no such option."""
        return self.config.get(name.replace("-", "_"))

    @property
    def resolved_config(self) -> str:
        """The whole configuration as YAML, defaults included. A resumed run's is that of an undisturbed one."""
        config = self.config.clone()
        for name in self._own:
            config.pop(name.replace("-", "_"), None)
        return str(self.parser.dump(config, skip_none=False))


def sizes_in(words: Iterable[str]) -> list[str]:
    """The options among them that say how small the model gets: the ratio, or a target."""
    names = {word.partition("=")[0] for word in words}
    return sorted(name for name in names if name.rpartition(".")[2] in ("pruning_ratio", *SIZES))


def check_one_size(words: Iterable[str]) -> None:
    """Raise UserError for a ratio beside a target: a configuration always has a ratio, so only what was said counts."""
    sizes = sizes_in(words)
    if len(sizes) > 1 and any(name.endswith("pruning_ratio") for name in sizes):
        raise UserError(f"{' and '.join(sizes)}: give one of them.")


def with_one_size(words: list[str]) -> list[str]:
    """A command line whose size takes the place of those in its configuration files, which are given as null."""
    given = {name.rpartition(".")[2] for name in sizes_in(word for word in words if not word.endswith("=null"))}
    there: set[str] = set()
    for option, word in pairwise(["", *words] if given else []):
        name, equals, path = word.partition("=")
        if option in CONFIG or (name in CONFIG and equals):
            model = read_config(Path(word if option in CONFIG else path).expanduser(), "--config").get("model")
            own = model.get("init_args") if isinstance(model, dict) else None
            there |= {size for size, value in own.items() if value is not None} if isinstance(own, dict) else set()
    return words + [f"--model.{size}=null" for size in (*SIZES, "n_remove_layers") if size in there - given]


def without_size(options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options without those that say how small the model gets."""
    return {name: value for name, value in options.items() if name not in ("pruning_ratio", *SIZES, "n_remove_layers")}


def build(label: str, configuration: Mapping[str, Any]) -> RunBuilder:
    """Trainer, method and data of one run of an experiment; a UserError names its system, ``label``."""
    try:
        built = RunBuilder(configuration)
    except UserError as error:
        raise UserError(f"system '{label}': {error}") from None
    if built.trainer.world_size > 1:
        raise UserError(
            f"--trainer.devices: an experiment runs on one device, found {built.trainer.world_size}. "
            "Prune large models with fit, then compare their folders with --runs."
        )
    return built


def quiet() -> None:
    """Silence what other libraries say in normal use and no user of this one can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without file and line
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # what --trainer.profiler prints
    for message in (
        "does not have many workers",
        "configure_optimizers",
        "in eval mode",
        "Total length of ",
        "LeafSpec",
        "isinstance.treespec",
        "GPU available but not used",
        "litlogger",
        "does not have a .*val_dataloader",
        "ModelCheckpoint.*held_out/loss.*could not find the monitored key",  # steps may end a run before an epoch
        "Checkpoint directory .* exists",
        "returned .*None",
        "is smaller than the logging interval",
        "args parameter is intended to run",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")


def _user_error_in(error: BaseException | None) -> UserError | None:
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(name, item)
    else:
        yield name, value


def _import_fault(path: str) -> str:
    module, _, name = path.rpartition(".")
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{error}; is its folder on PYTHONPATH?" if error.name == module else str(error)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return f"the module has no class '{name}'"


def _options_of(method: type) -> dict[str, Any]:
    """The types of a method's options, those of its bases included, by ``model.<name>``."""
    kinds: dict[str, Any] = {}
    for base in reversed(method.__mro__):
        if "__init__" in vars(base) and not base.__module__.startswith(("lightning.", "torch.", "builtins", "abc")):
            init = vars(base)["__init__"]
            rest = inspect.getfullargspec(init).varkw  # **options: what its bases take
            kinds |= {name: kind for name, kind in typing.get_type_hints(init).items() if name not in ("return", rest)}
    return {f"model.{name}": kind for name, kind in kinds.items()}


def plain(message: str, options: Sequence[str], methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Rewrite a parser error, which has line breaks and nested lists of everything that was tried.

    ``options`` are all names without dashes, the method's as ``model.<name>``; ``methods``: class name → its options.
    """
    keys = [name for name in re.findall(r'Parser key "([\w.]+)"', message) if name != "config"]
    key = keys[-1] if keys else ""
    if key not in options and f"model.{key}" in options:
        key = f"model.{key}"  # an error of the method's own parser
    if unknown := re.search(_UNKNOWN, message):
        word, group, member, option = unknown.groups()
        name = (
            word.partition("=")[0]
            if word
            else f"--{group}.{member}"
            if group
            else f"--{key}{'.' if key else ''}{option}"
        )
        if not name.startswith("-"):
            guess = f" Did you mean --config {name}?" if name in shipped_methods() else ""
            return f"unexpected argument '{name}'.{guess} Options are written --NAME VALUE. See --help."
        return _unknown(name, options, methods)
    if key == "model" and (dashed := re.search(r"NestedArg\(key='(\w+-[\w-]+)'", message)):
        return _unknown(f"--model.{dashed[1]}", options, methods)
    if linked := re.search(r'Linked "([\w.]+)" must be given via "([\w.]+)"', message):
        return f"--{linked[1]}: it follows --{linked[2].replace('init_args.', '')}. Leave it out."
    given = re.search(r"(?:Given|Got) value: (?:NestedArg\(key='[\w.]+', val=)?(.*?)\)?$", message, re.MULTILINE)
    if "required: model" in message or key == "model":
        value = re.sub(r"^\{'class_path': '?([^',}]*).*", r"\1", given[1]) if given else ""
        start = f"unknown method '{value[:200]}'" if value else "no method is chosen"
        if "." in value and not value.startswith("lightning_prune."):
            start += f", which cannot be imported ({_import_fault(value)})"
        guess = did_you_mean(value.rpartition(".")[2], [*methods]) if value else ""
        return f"--model: {start}.{guess} Methods: {', '.join(methods)}; or by configuration: --config wanda."
    if key and (needed := re.search(r"arguments are required: ([\w, ]+)", message)):
        first = needed[1].partition(",")[0]
        return f"--{key}: {needed[1]} must be given too: --{key} NAME --{key}.{first} VALUE."
    if key and given and (allowed := _allowed(message, key, given[1][:200])):
        return f"--{key}: found {given[1][:200] or 'nothing'}; allowed: {allowed}"
    if refused := re.search(r"Not of type \w+: (\S+) does not conform to restriction v(.+)", message):
        return f"--{key}: found '{refused[1]}'; allowed: a number {refused[2]}."
    lines = " ".join(line.strip(" -") for line in message.splitlines() if line.strip(" -"))
    return re.sub(r'Parser key "([\w.]+)":', r"--\1:", lines)[:500]


def _allowed(message: str, key: str, given: str) -> str:
    """What a parser error says that the option ``key`` takes in place of ``given``; empty where it says nothing."""
    kinds: list[str] = []
    words: list[str] = []
    for kind, literals in re.findall(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.*?)\])", message):
        words += [one.strip(" '") for one in literals.split(",")] if literals else []
        kinds += words if literals else [_WORDS.get(kind, kind)]
    kinds = [one for one in dict.fromkeys(kinds) if one != "NoneType"]
    if key == "model.pruning_ratio" and kinds:
        return "a share between 0 and 1, such as 0.3."
    example = f", such as --{key} '[{given}]'" if kinds == ["a list"] else ""
    return f"{', '.join(kinds)}{example}.{did_you_mean(given, words) if given else ''}" if kinds else ""


def _unknown(name: str, options: Sequence[str], methods: Mapping[str, Mapping[str, Any]]) -> str:
    """A hint on an unknown option: other methods that have it, else the option probably meant, of the same group or of
    that name in another group."""
    word = name.lstrip("-")
    if word not in options and (having := [method for method, own in methods.items() if word in own]):
        return f"unknown option {name} of this method; methods that have it: {', '.join(having)}."
    word = word.replace("-", "_")
    last = {option.rpartition(".")[2]: option for option in options}
    short = word.rpartition(".")[2]
    close = (
        difflib.get_close_matches(word, options, n=1, cutoff=0.75)
        or [last[one] for one in difflib.get_close_matches(short, last, n=1, cutoff=0.8)]
        or sorted(option for one, option in last.items() if one.endswith(f"_{short}"))
    )
    guess = f"Did you mean {' or '.join(f'--{one}' for one in close)}?" if close else "See --help for the options."
    return f"unknown option {name}. {guess}"
