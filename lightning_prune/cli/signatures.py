"""What a class of this package takes, read from its source: importing it would take seconds."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Option:
    """An argument of a constructor: its name, its default as it is written in a configuration, and its description.

    ``default`` is empty where there is none, or where only the description can say it.
    """

    name: str
    default: str
    text: str


def options_of(path: str) -> list[Option]:
    """The options of ``lightning_prune.methods.Wanda`` and the like, its bases' included where they are passed on.

    Raises:
        LookupError: no such class in this package.
    """
    found: dict[str, Option] = {}
    for node in _lineage(*_split(path)):
        texts = _texts(ast.get_docstring(node) or "")
        for name, default in _arguments(node):
            known = found.setdefault(name, Option(name, default, ""))
            found[name] = replace(known, text=known.text or texts.get(name, ""))
    return list(found.values())


def names_of(module: str) -> list[str]:
    """What ``__all__`` of a module of this package lists."""
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def _split(path: str) -> tuple[str, str]:
    module, _, name = path.rpartition(".")
    return module, name


def _lineage(module: str, name: str) -> Iterator[ast.ClassDef]:
    """The class, and the bases that its options reach."""
    module, node = _find(module, name)
    yield node
    constructor = _constructor(node)
    if constructor is not None and constructor.args.kwarg is None:
        return
    for base in node.bases:
        if isinstance(base, ast.Name):
            yield from _lineage(module, base.id)


def _find(module: str, name: str) -> tuple[str, ast.ClassDef]:
    """Where a class is defined: there, or where that module has it from."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and any((one.asname or one.name) == name for one in node.names):
            return _find(node.module or "", name)
    raise LookupError(f"{module}.{name}")


@cache
def _tree(module: str) -> ast.Module:
    first, *rest = module.split(".")
    place = PACKAGE.joinpath(*rest)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if first != PACKAGE.name or not file.is_file():
        raise LookupError(module)
    return ast.parse(file.read_text(encoding="utf-8"))


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)


def _arguments(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Name and default of every argument but ``self``."""
    if (constructor := _constructor(node)) is None:
        return
    names = [one.arg for one in constructor.args.args][1:]
    given = constructor.args.defaults
    defaults = [None] * (len(names) - len(given)) + list(given)
    for name, default in zip(names, defaults, strict=True):
        yield name, "" if default is None else _written(default)


def _written(default: ast.expr) -> str:
    """As YAML has it."""
    if not isinstance(default, ast.Constant):
        return ast.unparse(default)
    value = default.value
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _texts(docstring: str) -> dict[str, str]:
    """The descriptions below ``Args:``, by name."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", docstring, re.MULTILINE)
    entries = re.split(r"^    (?=\w+:)", section.group(1), flags=re.MULTILINE) if section else []
    pairs = (entry.partition(":") for entry in entries if entry.strip())
    return {name.strip(): " ".join(text.split()) for name, _, text in pairs}
