"""JSON that somebody else may have written, read into a type or refused in one sentence."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lightning_prune.support.errors import UserError
from lightning_prune.support.files import read_file

T = TypeVar("T")
LIMIT = 256 * 2**20  # bytes; the plan of a 70B model has some 30 MB
SHOWN = 5  # wrong fields per message


def read_json(path: Path, kind: type[T], option: str, hint: str = "") -> T:
    """Read a JSON file as ``kind``: a pydantic model, a dataclass or a built-in type. "3" is not a number.

    Raises:
        UserError: no regular file, no JSON, or wrong fields, each with what was found and what is allowed, between
            ``option``, which named the file, and ``hint``, what to do about it.
    """
    return parse_json(read_file(path, LIMIT, option), kind, f"{option}: '{path}'", hint)


def parse_json(data: bytes, kind: type[T], subject: str, hint: str = "") -> T:
    """Read JSON text as ``read_json`` does; ``subject`` begins the message."""
    adapter: TypeAdapter[T] = TypeAdapter(kind)
    try:
        return adapter.validate_json(data, strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    if errors[0]["type"] == "json_invalid":
        problem = f"cannot be read as JSON ({errors[0]['ctx']['error']})"
    else:
        more = [f"and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else []
        problem = "is not valid: " + "; ".join([*(_problem(dict(one)) for one in errors[:SHOWN]), *more])
    raise UserError(f"{subject} {problem}.{f' {hint}' if hint else ''}")


def _problem(one: dict[str, Any]) -> str:
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in one["loc"]).lstrip(".") or "it"
    if one["type"] == "missing":
        return f"{field} is missing"
    if one["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{field} is not known"
    value = repr(one["input"])
    value = value if len(value) <= 60 else f"{value[:57]}..."
    allowed = one["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("should be ")
    return f"{field} is {value}, allowed: {allowed}"
