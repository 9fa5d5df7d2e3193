"""What the package imports is declared, so that an installation without extras runs, and what runs it is pinned."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TRACKERS = {"wandb"}  # imported only where the user has chosen its logger


def imported() -> dict[str, set[str]]:
    """Top-level module of every import in the package that is not its own or Python's -> the files that import it."""
    found: dict[str, set[str]] = {}
    for file in (ROOT / "lightning_prune").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top != "lightning_prune":
                    found.setdefault(top, set()).add(str(file.relative_to(ROOT)))
    return found


def declared(*extras: str) -> list[Requirement]:
    """The package's own dependencies and those of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def test_constraints_pin_every_dependency_to_a_version_that_is_allowed() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = declared("recover", "dev")
    assert [one.name for one in wanted if not one.specifier.contains(pins.get(canonicalize_name(one.name), "0"))] == []


def test_every_import_is_a_declared_dependency() -> None:
    known = {canonicalize_name(one.name) for one in declared("eval", "gguf", "recover")}
    providers = packages_distributions()
    undeclared = {
        module: files
        for module, files in imported().items()
        if module not in TRACKERS and not known & {canonicalize_name(name) for name in providers.get(module, [module])}
    }
    assert undeclared == {}


def test_actions_of_the_workflows_are_pinned_by_commit() -> None:
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    used = [line for file in files for line in re.findall(r"uses: (.*)", file.read_text(encoding="utf-8"))]
    assert len(used) >= len(files)
    assert [line for line in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []
