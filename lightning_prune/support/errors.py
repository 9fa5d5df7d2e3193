"""The exceptions that the command line shows as one message, and how it shortens errors of other libraries."""

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """A mistake in the input: the command line prints the message alone and exits with status 2. It says what was
    found, what is allowed, and which option to change."""


class CheckpointError(Exception):
    """A written checkpoint is not what was meant to be written: exit status 1. The message says how it differs."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The question that ends a message on an unknown ``name``: about one that begins with it, else the closest one;
    empty where none is close."""
    near = [one for one in known if one.startswith(name)] or difflib.get_close_matches(name, known, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def first_line(error: BaseException) -> str:
    """An error of another library in one line: the first line of its message that is not empty, else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
