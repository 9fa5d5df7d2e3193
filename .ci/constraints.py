"""Print what the package and its extras, but for ``docs``, run with in this environment: one pin a line."""

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def pins(requirements: list[str]) -> dict[str, str]:
    """Version by name of everything that is installed for ``requirements``."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {extra for other, extra in seen if other == name}:
            seen.add((name, extra))
            try:
                one = distribution(name)
            except PackageNotFoundError:  # of another platform
                continue
            found[name] = Version(one.version).public  # 2.13.0+cpu is 2.13.0 elsewhere
            needed = [Requirement(line) for line in one.requires or ()]
            waiting += [it for it in needed if it.marker is None or it.marker.evaluate({"extra": extra})]
    return found


if __name__ == "__main__":
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name != "docs"]
    print("# What .ci/run newest passed with: pip install lightning-prune -c constraints.txt")
    for name, version in sorted(
        pins([*project["dependencies"], *(line for lines in extras for line in lines)]).items()
    ):
        print(f"{name}=={version}")
