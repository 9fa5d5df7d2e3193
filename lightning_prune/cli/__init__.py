"""The ``lightning-prune`` command: picks a subcommand and imports only what that one needs."""

import errno
import gc
import importlib
import io
import os
import signal
import sys
from typing import Any

from lightning_prune import __version__
from lightning_prune.runs.config_files import with_config_files
from lightning_prune.support.errors import CheckpointError, UserError, did_you_mean
from lightning_prune.support.files import FULL
from lightning_prune.support.signals import stoppable

COMMANDS = {
    "methods": "the methods there are, and the configuration to start each from",
    "fit": "calibrate, prune, save and evaluate one model with one method",
    "check": "what a run would take in memory, disk and work, and whether it fits, without reading weights",
    "decide": "another ratio or option from a finished run's scores, without calibrating",
    "tune": "choose a method's options on calibration samples that it did not measure on",
    "recover": "train a pruned model to give back what pruning took: LoRA or all weights",
    "test": "measure the perplexity of any dense or pruned model",
    "evaluate": "what a pruned model costs to run, and its zero-shot accuracy",
    "compare": "run an experiment over methods and ratios, or audit and compare runs that exist",
    "apply": "re-create a pruned checkpoint from a plan.json, without calibrating",
    "export": "a checkpoint as a GGUF file for llama.cpp, or padded for tools that know no widths per layer",
}

BUILT_FROM_CONFIGS = ("fit", "check", "tune", "recover", "test")

# Lightning reads them as numbers, some when it is imported.
LAUNCHER = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
SCHEDULER = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS")
# How many compiled matrix products oneDNN and torch's own layer above it keep. Both keep 1024, one for every shape they
# met, and layers of a pruned model differ in shape: 5 MB a layer that are never used again.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}

ENDS: dict[type[Exception], tuple[str, int]] = {  # how a message begins, and the exit status
    UserError: ("error", 2),
    FloatingPointError: ("numerical trouble", 1),
    CheckpointError: ("self-check failed", 1),
}

USAGE = """\
usage: lightning-prune <command> [options]

Prune a large language model and measure what it cost. Every method calibrates on the same tokens.

commands:
{commands}

examples:
  lightning-prune fit --config wanda
  lightning-prune fit --config wanda --model.pretrained path/to/llama --model.pruning_ratio 0.3
  lightning-prune test --model.pretrained logs/wanda/version_0/pruned

'lightning-prune <command> --help' lists a command's options.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command: ``argv`` without the program name, by default this process's. Returns the exit status: 0 done,
    2 a mistake in the input (one message on stderr, no traceback), 130 and 143 interrupted by SIGINT and SIGTERM, 1
    anything else."""
    arguments = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an encoding without arrows must not end a run that is done
            stream.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:<9}{what}" for name, what in COMMANDS.items())), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    with stoppable() as stop:
        try:
            status, left = _run(arguments), "the command had ended already"
            stop.over = True
        except BaseException as error:
            stop.over = True
            if stop.number is None:
                raise
            left = "; ".join(getattr(error, "__notes__", [])) or "nothing half-written is left"
    if stop.number is None:
        return status
    # Of several processes that Lightning, torchrun or SLURM started only the first one writes, and knows what is kept.
    ranks = [os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ]
    if ranks[:1] in ([], ["0"]):
        print(f"interrupted by {signal.Signals(stop.number).name}; {left}", file=sys.stderr)
    return 128 + stop.number


def _run(arguments: list[str]) -> int:
    try:
        _check_command(arguments[0])
        _prepare_environment()
        if arguments[0] in BUILT_FROM_CONFIGS:  # a name that is mistyped is answered before ten seconds of imports
            with_config_files(arguments[1:])
        status = int(_command(arguments[0]).main(arguments[1:]))
        if sys.stdout is not None:
            sys.stdout.flush()  # Python would say only at its end that nothing more can be written
        return status
    except tuple(ENDS) as error:
        kind, status = next(end for one, end in ENDS.items() if isinstance(error, one))
        print("\n".join([f"{kind}: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return status
    except SystemExit as stop:  # argparse, after --help or a mistake that it has printed
        return int(stop.code or 0)
    except OSError as error:  # a print's; whoever writes files says which
        if error.filename is not None or error.errno not in (errno.EPIPE, *FULL):
            raise
        if error.errno != errno.EPIPE:
            print(f"error: what the command prints cannot be written ({error.strerror})", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _command(name: str) -> Any:
    """Import the command's module. The garbage collector is off: it would scan the objects of the imported libraries
    again and again, a fifth of the time."""
    gc.disable()
    try:
        return importlib.import_module(f"lightning_prune.cli.commands.{name}")
    finally:
        gc.freeze()
        gc.enable()


def _prepare_environment() -> None:
    """Check the working folder and environment variables before libraries that fail on them are imported."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the working folder cannot be used ({error.strerror}). Change to one that exists.") from None
    for name in (*LAUNCHER, *SCHEDULER):
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdecimal()):
            raise UserError(
                f"the environment variable {name} is {value!r}; a launcher sets it to a whole number, 0 or more. "
                f"Unset it: unset {name}"
            )
    for name, value in KERNEL_CACHES.items():
        os.environ.setdefault(name, value)


def _check_command(name: str) -> None:
    if name.startswith("-"):
        raise UserError(
            f"'{name}' comes before the command. Options come after it: "
            f"lightning-prune fit {name}{' FILE' if name == '--config' else ''} …"
        )
    if name not in COMMANDS:
        close = did_you_mean("fit" if name == "prune" else name, list(COMMANDS))
        raise UserError(f"unknown command '{name}'.{close} Commands: {', '.join(COMMANDS)}.")
