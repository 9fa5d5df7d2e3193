"""Values that parse and yet cannot be meant: nothing where a value is needed, numbers and text no file can hold."""

import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

from jsonargparse import Namespace

from lightning_prune.runs.config_files import check_text
from lightning_prune.support.errors import UserError

LARGEST = 2**63 - 1
LARGEST_SEED = 2**32 - 1  # numpy's


def check_values(config: Namespace) -> None:
    """Look at every value of a parsed configuration.

    Raises:
        UserError: text with surrogates or NUL characters, whole numbers beyond 64 bits, or a seed out of range.
    """
    for name, value in _leaves("", config):
        option = f"--{name.replace('init_args.', '')}"
        if isinstance(value, str):
            check_text(value, option)
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise UserError(f"{option}: found {value}; whole numbers go up to {LARGEST}.")
    seed = config.get("seed_everything")
    if isinstance(seed, int) and not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"--seed_everything: found {seed}; it must lie between 0 and {LARGEST_SEED}.")


def refuse_nulls(options: dict[str, Any], owner: type, group: str) -> None:
    """Refuse ``null`` for options of ``owner`` that need a value; the parser lets it through for a class it picks.

    Raises:
        UserError: names the option and what it takes.
    """
    for name, value in options.items():
        if value is None and (hint := _hint(owner, name)) is not None and type(None) not in typing.get_args(hint):
            raise UserError(f"--{group}.{name}: found null; it needs a value: {_words(hint)}.")


def _hint(owner: type, name: str) -> Any:
    """The annotation of a constructor's argument, where options are passed on to the base class too."""
    for base in owner.__mro__:
        if "__init__" in vars(base) and name in inspect.signature(vars(base)["__init__"]).parameters:
            return typing.get_type_hints(vars(base)["__init__"]).get(name)
    return None


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_words, typing.get_args(hint)))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(name, item)
    else:
        yield name, value
