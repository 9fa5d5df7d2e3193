"""Print what the package and its extras run with in this environment, one pin a line."""

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def pins(requirement: str) -> dict[str, str]:
    """Version by name of everything that ``requirement`` and its extras pull in, itself left out."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(requirement)]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                one = distribution(name)
            except PackageNotFoundError:  # of an optional feature, or of CUDA
                continue
            found[name] = Version(one.version).public  # 2.13.0+cpu is 2.13.0 elsewhere
            for line in one.requires or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    found.pop(canonicalize_name(Requirement(requirement).name), None)
    return found


if __name__ == "__main__":
    print("# What .ci/run newest passed with: pip install lightning-prune -c constraints.txt")
    for name, version in sorted(pins("lightning-prune[dev,eval,gguf,recover]").items()):
        print(f"{name}=={version}")
