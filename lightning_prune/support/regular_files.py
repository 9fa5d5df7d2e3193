"""Regular files only: reading a pipe, a socket or a device given by mistake would wait or go on for ever."""

import os
import stat
from pathlib import Path

from lightning_prune.support.errors import UserError

KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}


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
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{option}: cannot read '{path}' ({reason}). Give a file that exists.") from None
    if kind_of(path) != "file":
        raise UserError(f"{option}: '{path}' is a {kind_of(path)}. Give a regular file.")
    return status.st_size


def kind_of(path: Path) -> str | None:
    """``file``, ``folder``, ``named pipe``, ``socket`` or ``device``; None where nothing is, also where the name is too
    long or leads in a circle."""
    try:
        return KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "device")
    except (OSError, ValueError):
        return None


def exists(path: Path) -> bool:
    """Whether anything is at ``path``."""
    return kind_of(path) is not None


def is_special(path: Path) -> bool:
    """Whether what is at ``path`` is neither a regular file nor a folder."""
    return kind_of(path) not in (None, "file", "folder")


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
    """``name`` with ``~/`` or ``~user/`` at its beginning replaced; names of datasets and hub ids are not changed.

    Raises:
        UserError: ``~name`` of a user who is not known here.
    """
    return str(expanded(name, option)) if name.startswith("~") and "/" in name else name
