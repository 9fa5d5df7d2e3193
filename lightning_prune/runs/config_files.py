"""Configuration files: shipped ones by name, others by path; regular, small, UTF-8, and meaning what they seem to."""

import locale
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from os.path import exists
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.support.errors import UserError, did_you_mean
from lightning_prune.support.files import read_file

SIZE_LIMIT = 1_000_000  # bytes
VALUE_LIMIT = 100_000  # values, counted as often as references name them
CLASSES = "lightning_prune.methods."
FILE_OPTIONS = ("--config", "--method", "--model", "--data", "--trainer")


@dataclass(frozen=True)
class Method:
    """A method with its defaults, as its configuration has them."""

    name: str  # that ``--method`` takes
    class_name: str  # in ``lightning_prune.methods``
    options: dict[str, Any]  # that differ from the defaults of the class
    sentence: str  # the first of the configuration's comment
    paper: str  # where it is from; empty for what is our own


def shipped_folder() -> Path:
    """The folder of the shipped configurations: inside the installed package, or beside it in a checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def shipped_names() -> list[str]:
    """``wanda``, ``targets/llama-3.1-8b``, …: paths below the folder, without suffix."""
    folder = shipped_folder()
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


@cache
def shipped_methods() -> dict[str, Method]:
    """The shipped configurations of one method each, by name: the one table of what there is to prune with."""
    methods = {}
    for name in shipped_names():
        path = shipped_folder() / f"{name}.yaml"
        model = read_config(path, "--config").get("model", {})
        if str(model.get("class_path")).startswith(CLASSES):
            comment = re.findall(r"^# (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            paper = next((line.removeprefix("Paper: ") for line in comment if line.startswith("Paper: ")), "")
            sentence = comment[0].partition(". ")[0].rstrip(".") + "."
            class_name = model["class_path"].removeprefix(CLASSES)
            methods[name] = Method(name, class_name, model.get("init_args", {}), sentence, paper)
    return methods


def config_file(given: str | Path, beside: Path | None = None, option: str = "--config") -> Path:
    """The file that ``given`` means: one that exists relative to ``beside``, else the shipped one of that name; for a
    bare name that is neither UserError. A path comes back as it is: its reader says what is wrong with it."""
    path = Path(beside or "", given)
    if os.path.isfile(path):  # false for a name too long to be one, where Path.is_file raises
        return path
    names = shipped_names()
    # A copy of a shipped experiment names the files beside the original.
    name = str(given) if beside is None else str(given).removesuffix(".yaml")
    if name in names:
        return shipped_folder() / f"{name}.yaml"
    if Path(given).name == str(given) and not str(given).endswith((".yaml", ".yml", ".json")) and not exists(path):
        names = names if option == "--config" else list(shipped_methods())
        close = did_you_mean(str(given), names)
        raise UserError(
            f"{option}: no file and no shipped configuration '{given}'.{close} Shipped: {', '.join(names)}."
        )
    return path


def with_config_files(arguments: Sequence[str]) -> list[str]:
    """A command line in which every ``--config`` names a file that can be read; ``--method`` says the same. Raises
    UserError as ``check_text``, ``config_file`` and ``read_config``."""
    words, option = list(arguments), ""
    for index, word in enumerate(words):
        check_text(word, "command line")
        name, equals, value = (option, "", word) if option in FILE_OPTIONS else word.partition("=")
        if name in ("--config", "--method") and (equals or name is option):
            path = config_file(value, option=name)
            if "systems" in read_config(path.expanduser(), name):
                raise UserError(
                    f"{name}: '{value}' is an experiment. Run it with lightning-prune compare --config {value}"
                )
            words[index] = f"--config={path}" if equals else str(path)
        elif name in FILE_OPTIONS and value and exists(Path(value)):
            read_config(Path(value), name)
        option = "" if name is option else word
        words[index] = re.sub("^--method$", "--config", words[index])
    return words


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a name", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_config(path: Path, option: str) -> dict[str, Any]:
    """The options in a configuration file; UserError, which ``option`` begins, for one that is not a regular file, too
    large, not UTF-8, not YAML, or not a mapping of options."""
    content = read_file(path, SIZE_LIMIT, option)
    try:
        text = content.decode("utf-8")
        encoding = "utf-8" if sys.flags.utf8_mode else locale.getpreferredencoding(False)
        if not text.isascii() and encoding.lower() != "utf-8":
            raise UserError(
                f"{option}: '{path}' has characters that the locale's encoding ({encoding}) cannot express. "
                "Set PYTHONUTF8=1."
            )
        content = yaml.load(text, _Loader)
        _check_references(content)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{option}: '{path}', line {line}: not UTF-8. Save the file as UTF-8.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = str(getattr(error, "problem", None) or error)
        raise UserError(f"{option}: '{path}'{where}: not usable as YAML ({problem}). Correct the file.") from None
    except RecursionError:
        raise UserError(f"{option}: '{path}' is nested too deeply. Give a flatter configuration.") from None
    if not isinstance(content, dict):
        raise UserError(f"{option}: '{path}' is not a list of options and values, such as 'seed_everything: 0'.")
    for name in ("model", "data", "trainer"):
        if isinstance(content.get(name), list):
            raise UserError(f"{option}: '{path}': '{name}': found a list; allowed are options with values.")
    return content


def _check_references(value: Any) -> None:
    """Raise ValueError where references (*) make a small file a large, or an endless, configuration."""
    pending, seen = [value], 0
    while pending:
        one = pending.pop()
        seen += 1
        if seen > VALUE_LIMIT:
            raise ValueError(f"more than {VALUE_LIMIT} values through its references (*)")
        pending += one.values() if isinstance(one, dict) else one if isinstance(one, list) else []


def check_text(value: str, where: str) -> None:
    """Raise UserError for text that no file can hold: NUL, and surrogates, as which Python reads what is not UTF-8."""
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
        raise UserError(
            f"{where}: {value!a} is not text in UTF-8. Rename the file or write the value in UTF-8; where the "
            "terminal's locale is not UTF-8, set PYTHONUTF8=1."
        )
