"""LightningCLI set up for this project: defaults, short error messages, and quiet third parties."""

import difflib
import inspect
import logging
import os
import re
import warnings
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.errors import UserError
from lightning_prune.evaluation.module import EvaluatedModel
from lightning_prune.methods.base import PruningMethod

DEFAULT_ROOT = "logs"


class Parser(LightningArgumentParser):
    """Ends a mistake in one message that names the nearest valid option, instead of pages of usage."""

    method_class: type = EvaluatedModel

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UserError with jsonargparse's message and a hint."""
        if isinstance(ex, UserError):
            raise ex
        text = re.sub(r"\s+", " ", message).strip()
        raise UserError(text + self._hint(text))

    def _hint(self, message: str) -> str:
        if "config" in message and "does not exist" in message:
            return " Shipped configurations are in configs/."
        if "import path" in message or "class_path" in message:
            return f" Methods: {', '.join(sorted(known_methods()))}."
        found = re.search(r"(?:unrecognized arguments:|[Oo]ption|[Kk]ey) '?-{0,2}([\w.]+)", message)
        if found is None:
            return ""
        options = self._option_names()
        name = found.group(1)
        close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
        close = close or [option for option in options if option.split(".")[-1] == name][:1]
        close = close or difflib.get_close_matches(f"model.{name}", options, n=1, cutoff=0.5)
        return f" Did you mean --{close[0]}?" if close else " See --help for the options."

    def _option_names(self) -> list[str]:
        names = [option.lstrip("-") for option in self._option_string_actions]
        classes = {EvaluatedModel, *known_methods().values()}
        methods = {f"model.{name}" for found in classes for name in inspect.signature(found.__init__).parameters}
        return sorted({*names, *methods} - {"model.self"})


class PruneCLI(LightningCLI):
    """Parses and builds trainer, model and data; the command runs them."""

    def __init__(self, argv: list[str], model_class: type[EvaluatedModel], subclasses: bool, command: str) -> None:
        quiet()
        super().__init__(
            model_class,
            CalibrationDataModule,
            subclass_mode_model=subclasses,
            save_config_callback=None,
            parser_class=Parser,
            parser_kwargs={"prog": f"lightning-prune {command}", "description": _DESCRIPTION[command]},
            trainer_defaults={
                "max_epochs": 1,
                "enable_checkpointing": False,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "default_root_dir": DEFAULT_ROOT,
                "devices": 1,
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            run=False,
            args=argv,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The tokenizer is the model's."""
        source = "model.init_args.pretrained" if self.subclass_mode_model else "model.pretrained"
        parser.link_arguments(source, "data.tokenizer")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """TensorBoard below ``<root>/<label>`` unless the user asks for another logger or none."""
        if self._get(self.config_init, "trainer.logger") in (None, True):
            label = self.model.label if isinstance(self.model, PruningMethod) else "test"
            root = self._get(self.config_init, "trainer.default_root_dir") or DEFAULT_ROOT
            kwargs["logger"] = TensorBoardLogger(root, name=label, default_hp_metric=False)
        return super().instantiate_trainer(**kwargs)

    @property
    def resolved_config(self) -> str:
        """The whole configuration as YAML, defaults included."""
        return str(self.parser.dump(self.config, skip_none=False))


def known_methods() -> dict[str, type]:
    """Concrete methods by class name, as far as they are imported."""
    found: dict[str, type] = {}
    waiting: list[type] = [PruningMethod]
    while waiting:
        current = waiting.pop()
        waiting += current.__subclasses__()
        if not inspect.isabstract(current):
            found[current.__name__] = current
    return found


def quiet() -> None:
    """Silence what other libraries say in normal use and no user of this one can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
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
        ".*Checkpoint directory .* exists.*",
        ".*returned .*None.*",
        ".*is smaller than the logging interval.*",
        ".*args parameter is intended to run.*",
    ):
        warnings.filterwarnings("ignore", message=message)


_DESCRIPTION = {
    "fit": (
        "Calibrate, prune, save and evaluate one model with one method. Start from a file in configs/: "
        "lightning-prune fit --config configs/wanda.yaml. Options of the method are --model.OPTION (list them with "
        "--model.help NAME, for instance --model.help Wanda), those of the calibration set --data.OPTION, those of "
        "Lightning --trainer.OPTION. Several --config overlay one another; --print_config shows the result."
    ),
    "decide": (
        "Make another pruning decision from the scores of a finished run, without calibrating: "
        "lightning-prune decide --run logs/wanda/version_0 --model.pruning_ratio 0.3."
    ),
    "test": (
        "Measure the perplexity of a dense or pruned model with the protocol of the pruning runs: "
        "lightning-prune test --model.pretrained FOLDER --data.eval_datasets '[wikitext2, ptb]'."
    ),
}
