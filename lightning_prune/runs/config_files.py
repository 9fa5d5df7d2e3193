"""Configuration files: regular, small, UTF-8, and meaning what they seem to mean."""

import locale
import sys
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.support.errors import UserError
from lightning_prune.support.regular_files import require_regular

SIZE_LIMIT = 1_000_000  # bytes
VALUE_LIMIT = 100_000  # values, counted as often as references name them


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key, yaml.ScalarNode) else True:
                what = f"'{key.value}' is given twice" if isinstance(key, yaml.ScalarNode) else "a key is not a name"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_config(path: Path, option: str) -> dict[str, Any]:
    """The options in a configuration file.

    Args:
        path: of the file.
        option: begins the message of an error.

    Raises:
        UserError: not a regular file, too large, not UTF-8, not YAML, or not a mapping of options.
    """
    size = require_regular(path, option)
    if size > SIZE_LIMIT:
        raise UserError(f"{option}: '{path}' has {size} bytes; a configuration has at most {SIZE_LIMIT}.")
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
        if not text.isascii() and not sys.flags.utf8_mode and locale.getpreferredencoding(False).lower() != "utf-8":
            raise UserError(
                f"{option}: '{path}' has characters that the locale's encoding ({locale.getpreferredencoding(False)}) "
                "cannot express. Set PYTHONUTF8=1."
            )
        found = yaml.load(text, _Loader)
        _check_references(found)
    except OSError as error:
        raise UserError(f"{option}: cannot read '{path}' ({error.strerror}). Give a file that can be read.") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{option}: '{path}', line {line}: not UTF-8. Save the file as UTF-8.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = str(getattr(error, "problem", None) or error)
        raise UserError(f"{option}: '{path}'{where}: not usable as YAML ({problem}).") from None
    except RecursionError:
        raise UserError(f"{option}: '{path}' is nested too deeply for a configuration.") from None
    if not isinstance(found, dict):
        raise UserError(f"{option}: '{path}' holds no options and their values, such as 'seed_everything: 0'.")
    for name in ("model", "data", "trainer"):
        if isinstance(found.get(name), list):
            raise UserError(f"{option}: '{path}': '{name}' holds a list; it holds options and their values.")
    return found


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
    """Refuse text that no file can hold.

    Raises:
        UserError: surrogates, which stand for bytes that are not UTF-8, or a NUL character.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        value += "\0"
    if "\0" in value:
        raise UserError(
            f"{where}: {value.removesuffix(chr(0))!a} is not text in UTF-8. Rename the file or write the value in "
            "UTF-8; where the terminal's locale is not UTF-8, set PYTHONUTF8=1."
        )
