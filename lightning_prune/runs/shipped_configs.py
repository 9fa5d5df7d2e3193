"""The configurations that come with the package: ``--config wanda`` means the shipped ``wanda.yaml``.

Those of methods are the one table of what there is to prune with: ``METHODS``.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from os.path import exists
from pathlib import Path
from typing import Any

from lightning_prune.runs.config_files import check_text, read_config
from lightning_prune.support.errors import UserError

CLASSES = "lightning_prune.methods."
FILE_OPTIONS = ("--config", "--model", "--data", "--trainer")


@dataclass(frozen=True)
class Method:
    """A method with its defaults, as its configuration has them."""

    name: str  # that ``--method`` takes
    class_name: str  # in ``lightning_prune.methods``
    options: dict[str, Any]  # that differ from the defaults of the class
    sentence: str  # the first of the configuration's comment
    paper: str  # where it is from; empty for what is our own


def shipped_folder() -> Path:
    """Where they are: inside the installed package, or beside it in a checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def shipped_names() -> list[str]:
    """``wanda``, ``targets/llama-3.1-8b``, …: paths below the folder, without suffix."""
    folder = shipped_folder()
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


@cache
def shipped_methods() -> dict[str, Method]:
    found = {}
    for name in shipped_names():
        path = shipped_folder() / f"{name}.yaml"
        model = read_config(path, "--config").get("model", {})
        if str(model.get("class_path")).startswith(CLASSES):
            comment = re.findall(r"^# (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            paper = next((line.removeprefix("Paper: ") for line in comment if line.startswith("Paper: ")), "")
            sentence = comment[0].partition(". ")[0].rstrip(".") + "."
            class_name = model["class_path"].removeprefix(CLASSES)
            found[name] = Method(name, class_name, model.get("init_args", {}), sentence, paper)
    return found


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
    if Path(given).name == str(given) and not str(given).endswith((".yaml", ".yml", ".json")) and not exists(path):
        raise UserError(f"{option}: no file and no shipped configuration '{given}'. Shipped: {', '.join(names)}.")
    return path


def with_config_files(arguments: Sequence[str]) -> list[str]:
    """A command line in which every ``--config`` names a file that can be read; ``--method`` says the same.

    Raises:
        UserError: an argument that is not UTF-8, or as ``config_file`` and ``read_config``.
    """
    words = [re.sub(r"^--method(=|$)", r"--config\1", word) for word in arguments]
    for index, word in enumerate(words):
        check_text(word, "command line")
        before = words[index - 1] if index else ""
        option, equals, value = (before, "", word) if before in FILE_OPTIONS else word.partition("=")
        if option == "--config" and (equals or option is before):
            path = config_file(value)
            read_config(path.expanduser(), option)
            words[index] = f"--config={path}" if equals else str(path)
        elif option in FILE_OPTIONS and value and exists(Path(value)):
            read_config(Path(value), option)
    return words
