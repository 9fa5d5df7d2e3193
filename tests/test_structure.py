"""The house: imports only go down, and nothing in it is too long to read."""

import ast
from functools import cache
from pathlib import Path

import lightning_prune

PACKAGE = Path(__file__).parents[1] / "lightning_prune"
# From the top; a room may import itself and what comes after it.
ROOMS = (
    *("cli", "api", "comparison", "runs", "recovery", "formats", "evaluation", "methods", "checkpoint"),
    *("calibration", "models", "data", "demo", "support"),
)
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 400, 50  # lines; code lines of a function, docstring and blank lines aside


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightning_prune."):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("lightning_prune.")}
    return names


def test_imports_only_go_down() -> None:
    rooms = [(path, ROOMS.index(room(path))) for path in FILES if room(path) not in ("__init__", "__main__")]
    above = [(str(path), name) for path, at in rooms for name in imported(path) if ROOMS.index(name.split(".")[1]) < at]
    assert above == []


def test_no_room_has_the_name_of_a_public_function() -> None:
    """Once imported, the folder would take the function's place: ``lp.export(…)`` would call a module."""
    assert not set(lightning_prune.__all__) & {path.relative_to(PACKAGE).parts[0] for path in FILES}


def test_no_module_imports_itself_in_a_circle() -> None:
    names = {
        "lightning_prune." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in FILES
    }
    edges = {name: {target for target in imported(path) if target in names} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        if name not in done:
            for target in edges[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in names:
        visit(name, ())


def code_lines(node: ast.AST, lines: list[str]) -> int:
    body = node.body  # type: ignore[attr-defined]
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    start = body[0].end_lineno + 1 if documented else body[0].lineno
    text = [line.strip() for line in lines[start - 1 : node.end_lineno]]  # type: ignore[attr-defined]
    return sum(bool(line) and not line.startswith("#") for line in text)


def test_files_and_functions_are_short() -> None:
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= LONGEST_FILE, path
        functions = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef)]
        assert [node.name for node in functions if code_lines(node, lines) > LONGEST_FUNCTION] == [], path
