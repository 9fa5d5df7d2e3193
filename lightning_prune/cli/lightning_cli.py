"""LightningCLI set up for this project: defaults, short error messages, and quiet third parties."""

import importlib
import inspect
import logging
import os
import sys
import traceback
import warnings
from typing import Any, ClassVar, NoReturn

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only

from lightning_prune import methods
from lightning_prune.cli.descriptions import DESCRIPTION
from lightning_prune.cli.messages import plain, unusable_value
from lightning_prune.cli.strategy import cpu_processes, trainer_for_calibration
from lightning_prune.cli.trainer_options import check_callbacks, check_fixed
from lightning_prune.cli.values import check_values, refuse_nulls
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.evaluation.perplexity import Evaluation
from lightning_prune.methods.base import PruningMethod
from lightning_prune.runs.config_files import check_command_line
from lightning_prune.runs.shipped_configs import with_config_files
from lightning_prune.support.errors import UserError
from lightning_prune.support.progress import Progress

DEFAULT_ROOT = "logs"
RESUMABLE = ("fit", "recover")
TELLING = ("fit", "decide", "recover", "test")


class Parser(LightningArgumentParser):
    """Ends a mistake in one message that names the nearest valid option, instead of pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UserError: the method's or datamodule's own where that is the cause, else a plain one."""
        if not self.exit_on_error:  # a parser within the parser, for one class: the outer one reports
            super().error(message, ex)
        raise user_error_behind(ex) or UserError(plain(message, self._option_names(), list(known_methods()))) from None

    def _option_names(self) -> list[str]:
        names = [option.lstrip("-") for option in self._option_string_actions]
        classes = {base for found in (Evaluation, *known_methods().values()) for base in found.__mro__}
        own = [base for base in classes if base.__module__.startswith(methods.__name__.split(".")[0])]
        options = {f"model.{name}" for base in own for name in inspect.signature(base).parameters}
        return sorted({*names, *options} - {"model.init_args", "model.options", "model.group_options"})


class PruneCLI(LightningCLI):
    """Parses and builds trainer, model and data; the command runs them."""

    data_class: type[L.LightningDataModule] = CalibrationDataModule
    defaults: ClassVar[dict[str, Any]] = {
        "max_epochs": 1,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "default_root_dir": DEFAULT_ROOT,
        "devices": 1,
    }

    def __init__(
        self, argv: list[str] | dict[str, Any], model_class: type[L.LightningModule], subclasses: bool, command: str
    ) -> None:
        quiet()
        self._command = command
        try:
            self._parse_and_build(argv, model_class, subclasses, command)
        except (TypeError, ValueError) as error:  # jsonargparse's own, or what a constructor raises wrapped in one
            if (known := user_error_behind(error)) is not None:
                raise known from None
            if "jsonargparse" not in traceback.extract_tb(error.__traceback__)[-1].filename:
                raise
            raise UserError(unusable_value(str(error))) from None

    def _parse_and_build(
        self, argv: list[str] | dict[str, Any], model_class: type[L.LightningModule], subclasses: bool, command: str
    ) -> None:
        super().__init__(
            model_class,
            self.data_class,
            subclass_mode_model=subclasses,
            save_config_callback=None,
            parser_class=Parser,
            parser_kwargs={
                "allow_abbrev": False,  # --data.num_sample is a mistake, not num_samples
                "prog": f"lightning-prune {command}",
                "usage": f"lightning-prune {command} [--config FILE ...] [--model.OPTION VALUE] [--data.OPTION VALUE] "
                f"[--trainer.OPTION VALUE]{' [--resume]' if command in RESUMABLE else ''}"
                f"{' [--quiet] [--json]' if command in TELLING else ''}",
                "description": DESCRIPTION[command],
            },
            trainer_defaults=self.defaults,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            run=False,
            args=with_config_files(argv) if isinstance(argv, list) else argv,
        )
        chosen = type(self.model)
        if any(getattr(getattr(chosen, name, None), "__isabstractmethod__", False) for name in dir(chosen)):
            raise UserError(
                f"--model: '{chosen.__name__}' is no method. Methods: {', '.join(sorted(known_methods()))}."
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse what the parser would wait for or stumble over, and what it lets through.

        Raises:
            UserError: as ``check_command_line``, ``check_values`` and ``refuse_nulls``.
        """
        arguments = sys.argv[1:] if args is None else args
        if isinstance(arguments, list):
            check_command_line([str(argument) for argument in arguments])
        super().parse_arguments(parser, args)
        if self.subclass_mode_model and self.config.get("model") is not None:
            module, _, name = self.config.model.class_path.rpartition(".")
            owner = getattr(importlib.import_module(module), name)
            refuse_nulls(dict(self.config.model.get("init_args") or {}), owner, "model")
        check_values(self.config)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The tokenizer is the model's; only ``fit`` and ``recover`` can go on with a run."""
        source = "model.init_args.pretrained" if self.subclass_mode_model else "model.pretrained"
        parser.link_arguments(source, "data.tokenizer")
        if self._command in RESUMABLE:
            parser.add_argument(
                "--resume",
                action="store_true",
                help="go on with the newest unfinished run of the same model, calibration set and options, at the "
                "first layer that is not finished (recover: the last saved state); the result is that of an "
                "undisturbed run",
            )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """TensorBoard below ``<root>/<label>`` unless the user asks for another logger or none, and a strategy without
        gradient synchronisation where several processes run.

        Raises:
            UserError: a trainer that cannot be, one that would not read the whole sets, or 16-mixed on the CPU.
        """
        options = dict(self._get(self.config_init, "trainer"))
        check_fixed(options)
        callbacks = check_callbacks(options["callbacks"])
        label = self.model.label if isinstance(self.model, PruningMethod) else "test"
        kwargs |= self._surroundings(options, callbacks, label)
        trainer = trainer_for_calibration(lambda strategy: self._trainer(kwargs, strategy))
        return self._checked(trainer, options["precision"])

    def _surroundings(self, options: dict[str, Any], callbacks: list[Callback], label: str) -> dict[str, Any]:
        """The trainer's arguments that are the same for every command: our own bar, logger and devices."""
        own_bar = any(isinstance(one, ProgressBar) for one in callbacks)
        if options["enable_progress_bar"] is not False and not own_bar:
            self.model.progress = Progress(shown=getattr(rank_zero_only, "rank", 0) == 0)
            if self.model.progress.shown:
                self.datamodule.show_progress()
        found = {"callbacks": callbacks, "enable_checkpointing": False, "enable_progress_bar": own_bar}
        found["devices"] = cpu_processes(options["accelerator"], options["devices"])
        if options["logger"] in (None, True):
            root = options["default_root_dir"] or DEFAULT_ROOT
            found["logger"] = TensorBoardLogger(root, name=label, default_hp_metric=False)
        return found

    def _trainer(self, kwargs: dict[str, Any], strategy: Strategy | None) -> Any:
        chosen = kwargs if strategy is None else kwargs | {"strategy": strategy}
        try:
            return super().instantiate_trainer(**chosen)
        except (MisconfigurationException, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"--trainer: {error}") from error

    def _checked(self, trainer: Any, wish: Any) -> Any:
        """The trainer, unless Lightning silently took another precision than the one that was asked for."""
        if str(wish) in ("16", "16-mixed") and str(trainer.precision) != "16-mixed":
            raise UserError(
                f"--trainer.precision: found {wish}, which Lightning runs on GPUs only; this run is on the CPU. "
                "Allowed there: 32-true, bf16-true, 16-true, bf16-mixed, 64-true."
            )
        return trainer

    @property
    def resume(self) -> bool:
        """Whether ``--resume`` was given."""
        return bool(self.config.get("resume", False))

    @property
    def resolved_config(self) -> str:
        """The whole configuration as YAML, defaults included. A resumed run's is that of an undisturbed one."""
        config = self.config.clone()
        config.pop("resume", None)
        return str(self.parser.dump(config, skip_none=False))


def user_error_behind(error: BaseException | None) -> UserError | None:
    """The UserError that ``error`` is or was caused by, if any."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def known_methods() -> dict[str, type]:
    """The package's methods by class name."""
    return {name: getattr(methods, name) for name in methods.__all__}


def quiet() -> None:
    """Silence what other libraries say in normal use and no user of this one can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without file and line
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*configure_optimizers. returned .None.*",
        ".*No .*configure_optimizers.*",
        ".*in eval mode.*",
        ".*Total length of .*",
        ".*LeafSpec.*",
        ".*isinstance.treespec.*",
        ".*GPU available but not used.*",
        ".*litlogger.*",
        ".*does not have a .*val_dataloader.*",
        ".*ModelCheckpoint.*held_out/loss.*could not find the monitored key.*",  # where steps end a run before an epoch
        ".*Checkpoint directory .* exists.*",
        ".*returned .*None.*",
        ".*is smaller than the logging interval.*",
        ".*args parameter is intended to run.*",
    ):
        warnings.filterwarnings("ignore", message=message)
