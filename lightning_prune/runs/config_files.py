"""Configuration files, before the parser opens them: regular, small, UTF-8, and meaning what they seem to mean."""

import locale
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from lightning_prune.support.errors import UserError
from lightning_prune.support.regular_files import is_special, require_regular

OPTIONS = ("--config", "--model", "--data", "--trainer")  # those that take a file
SIZE_LIMIT = 10_000_000  # bytes
VALUE_LIMIT = 4_000  # characters: longer than a path may be, and numbers of more digits are not read
NODE_LIMIT = 100_000  # values, each reference counted as often as it is used


def check_command_line(arguments: Sequence[str]) -> None:
    """Refuse what would make the parser wait, fail or guess.

    Args:
        arguments: the command line, without the program's and the command's name.

    Raises:
        UserError: an argument that is not UTF-8, or a file that is no regular file, too large, not UTF-8, lists one key
            twice, or grows without bounds through references.
    """
    for argument in arguments:
        check_text(argument, "command line")
    for option, value in _pairs(arguments):
        path = Path(value).expanduser()
        if is_special(path):
            require_regular(path, option)
        if path.is_file():
            check_file(path, option)


def check_text(value: str, where: str) -> None:
    """Refuse text that no file can hold.

    Raises:
        UserError: surrogates, which stand for bytes that are not UTF-8, or a NUL character.
    """
    if "\0" in value or not _is_utf8(value):
        raise UserError(
            f"{where}: {value!a} is not text in UTF-8. Rename the file or write the value in UTF-8; where the "
            "terminal's locale is not UTF-8, set PYTHONUTF8=1."
        )


def _is_utf8(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        option, equals, value = argument.partition("=")
        if option in OPTIONS:
            yield option, value if equals else following


def check_file(path: Path, option: str) -> None:
    """Look at a configuration file as ``check_command_line`` does.

    Raises:
        UserError: as there.
    """
    size = require_regular(path, option)
    if size > SIZE_LIMIT:
        raise UserError(f"{option}: '{path}' has {size} bytes; a configuration has at most {SIZE_LIMIT}.")
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise UserError(f"{option}: cannot read '{path}' ({error.strerror}). Give a file that can be read.") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{option}: '{path}', line {line}, is not UTF-8. Save the file in UTF-8.") from None
    if not text.isascii() and not sys.flags.utf8_mode and locale.getpreferredencoding(False).lower() != "utf-8":
        raise UserError(
            f"{option}: '{path}' has characters that the locale's encoding ({locale.getpreferredencoding(False)}) "
            "cannot express. Set PYTHONUTF8=1."
        )
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{option}: '{path}' holds no options and their values, such as 'seed_everything: 0'.")
        _check_node(root, path, option)
        _check_groups(root, path, option)
    except yaml.YAMLError:
        return  # the parser says where
    except RecursionError:
        raise UserError(f"{option}: '{path}' is nested too deeply for a configuration.") from None


def _check_node(root: yaml.Node | None, path: Path, option: str) -> None:
    left = NODE_LIMIT
    pending = [root]
    while pending:
        node = pending.pop()
        left -= 1
        if left < 0:  # a reference to itself ends here too
            raise UserError(f"{option}: '{path}' stands for more than {NODE_LIMIT} values through its references (*).")
        if isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)
        elif isinstance(node, yaml.ScalarNode):
            if len(node.value) > VALUE_LIMIT:
                raise UserError(
                    f"{option}: '{path}', line {node.start_mark.line + 1}: a value of {len(node.value)} characters."
                )
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        line = key.start_mark.line + 1
                        raise UserError(f"{option}: '{path}', line {line}: '{key.value}' is given twice. Keep one.")
                    seen.add(key.value)
                pending.extend((key, value))


def _check_groups(root: yaml.Node | None, path: Path, option: str) -> None:
    """The parser fails on a list where a group of options is expected."""
    entries = root.value if isinstance(root, yaml.MappingNode) else []
    for key, value in entries:
        if key.value in ("trainer", "data", "model") and isinstance(value, yaml.SequenceNode):
            raise UserError(
                f"{option}: '{path}', line {value.start_mark.line + 1}: '{key.value}' holds a list; it holds options "
                "and their values."
            )
