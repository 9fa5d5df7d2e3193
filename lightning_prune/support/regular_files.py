"""Regular files only: reading a pipe, a socket or a device given by mistake would wait or go on for ever."""

import os
import stat
from pathlib import Path

from lightning_prune.support.errors import UserError


def require_regular(path: Path, option: str) -> int:
    """Refuse anything but a regular file (links are followed), without opening it.

    Args:
        path: what the user or a file of theirs named.
        option: begins the message: where the name came from.

    Returns:
        The file's size in bytes.

    Raises:
        UserError: missing, unreachable, or a folder, pipe, socket or device.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{option}: cannot read '{path}' ({reason}). Give a file that exists.") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{option}: '{path}' is a {_kind(found.st_mode)}. Give a regular file.")
    return found.st_size


def exists(path: Path) -> bool:
    """Whether anything stands at ``path``: False, too, where the name is too long or leads in a circle."""
    try:
        os.stat(path)
    except (OSError, ValueError):
        return False
    return True


def expanded(path: str, option: str) -> Path:
    """``path`` with ``~`` replaced.

    Raises:
        UserError: ``~name`` of a user who is not known here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{option}: '{path}' begins with the home folder of a user who is not known here.") from None


def from_home(name: str, option: str) -> str:
    """``name`` with ``~/`` or ``~user/`` at its beginning replaced; names of datasets and hub ids stay as they are.

    Raises:
        UserError: ``~name`` of a user who is not known here.
    """
    return str(expanded(name, option)) if name.startswith("~") and "/" in name else name


def is_special(path: Path) -> bool:
    """Whether something stands at ``path`` that is neither a regular file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _kind(mode: int) -> str:
    names = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "named pipe"), (stat.S_ISSOCK, "socket"))
    return next((name for test, name in names if test(mode)), "device")
