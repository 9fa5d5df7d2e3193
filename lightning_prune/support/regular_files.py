"""Regular files only: reading a pipe, a socket or a device given by mistake would wait or read for ever."""

import os
import stat
from pathlib import Path

from lightning_prune.support.errors import UserError

KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}


def require_regular(path: Path, option: str) -> int:
    """The size in bytes of a regular file (links are followed), which is not opened; UserError, which begins with
    ``option``, for a folder, pipe, socket or device and where there is nothing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{option}: cannot read '{path}' ({reason}). Give a file that exists.") from None
    kind = KINDS.get(stat.S_IFMT(status.st_mode), "device")
    if kind != "file":
        raise UserError(f"{option}: '{path}' is a {kind}. Give a regular file.")
    return status.st_size


def is_special(path: Path) -> bool:
    """Whether what is at ``path`` is neither a regular file nor a folder."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def expanded(path: str, option: str) -> Path:
    """``path`` with ``~`` replaced; UserError for a user who is not known here."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{option}: '{path}' begins with the home folder of a user who is not known here. Give the whole path."
        ) from None


def from_home(name: str, option: str) -> str:
    """Expand ``name`` where it begins with ``~/`` or ``~user/``; datasets and hub ids are not changed."""
    return str(expanded(name, option)) if name.startswith("~") and "/" in name else name
