"""The configurations that come with the package: ``--config wanda`` means the shipped ``wanda.yaml``."""

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_prune.support.errors import UserError


def shipped_folder() -> Path:
    """Where they are: inside the installed package, or beside it in a checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def shipped_names() -> list[str]:
    """``wanda``, ``targets/llama-3.1-8b``, …: paths below the folder, without suffix."""
    folder = shipped_folder()
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def config_file(given: str | Path, beside: Path = Path(), option: str = "--config") -> Path:
    """The file that ``given`` means: one that exists relative to ``beside``, else the shipped one of that name.

    Raises:
        UserError: a bare name that is neither. (A path comes back as it is: its reader says what is wrong with it.)
    """
    path = beside / given
    if os.path.isfile(path):  # false for a name too long to be one, where Path.is_file raises
        return path
    names = shipped_names()
    if str(given) in names:
        return shipped_folder() / f"{given}.yaml"
    if (
        Path(given).name == str(given)
        and not str(given).endswith((".yaml", ".yml", ".json"))
        and not os.path.exists(path)
    ):
        raise UserError(f"{option}: no file and no shipped configuration '{given}'. Shipped: {', '.join(names)}.")
    return path


def with_config_files(arguments: Sequence[str]) -> list[str]:
    """A command line in which every ``--config`` names a file; ``--method`` says the same in other words.

    Raises:
        UserError: see ``config_file``.
    """
    found = [_as_config(argument) for argument in arguments]
    for index, argument in enumerate(found):
        if argument.startswith("--config="):
            found[index] = f"--config={config_file(argument.partition('=')[2])}"
        elif index and found[index - 1] == "--config":
            found[index] = str(config_file(argument))
    return found


def _as_config(argument: str) -> str:
    option, equals, value = argument.partition("=")
    return f"--config{equals}{value}" if option == "--method" else argument


def described() -> dict[str, str]:
    """The first sentence of each shipped configuration of a method, by name."""
    found = {}
    for name in shipped_names():
        text = (shipped_folder() / f"{name}.yaml").read_text(encoding="utf-8")
        if "class_path: lightning_prune.methods." in text and text.startswith("#"):
            found[name] = text.splitlines()[0].removeprefix("#").strip().partition(". ")[0].rstrip(".") + "."
    return found
