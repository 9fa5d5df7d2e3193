"""Files and folders that appear whole or not at all, and locks that say whether their writer still lives.

Everything is written under a hidden temporary name beside its target (``.<name>.<random>.tmp``), which the writer holds
with ``flock`` until the one rename at the end. The system lets go of the lock however the process ends, so a temporary
file that nobody holds belongs to a process that was killed, and ``sweep`` may remove it.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_prune.support.errors import UserError

TEMPORARY = re.compile(r"\..+\.tmp")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class Lock:
    """A file or folder that this process holds, exclusively, until it lets go or ends."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle = handle

    @classmethod
    def take(cls, path: Path, create: bool = False, own: bool = False) -> "Lock | None":
        """Hold ``path``; None where another process does, or where the path is gone or was replaced meanwhile.

        Args:
            path: a file or folder.
            create: make an empty file if there is none.
            own: this process made it. On a file system without locks it then has it all the same, and nobody else
                ever gets it: nothing is taken to be dead there.

        Raises:
            OSError: it cannot be opened.
        """
        try:
            handle = os.open(path, (os.O_RDWR | os.O_CREAT if create else os.O_RDONLY) | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            if create:
                raise
            return None
        try:
            with suppress(BlockingIOError):
                _flock(handle, own)
                # Whoever held it before may have removed it between the opening and the lock.
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return cls(path, handle)
        except OSError:
            pass
        os.close(handle)
        return None

    def write(self, text: str) -> None:
        """Replace the held file's content."""
        os.truncate(self._handle, 0)
        os.pwrite(self._handle, text.encode(), 0)

    def release(self) -> None:
        """Let go; what was held stays. Twice is harmless."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def remove(self) -> None:
        """Remove the held file or folder, then let go."""
        if self._handle >= 0:
            _remove(self.path)
            self.release()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``, whole or not at all.

    Raises:
        OSError: the folder cannot be written or the disk is full; ``path`` is then unchanged.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: Any) -> None:
    """Write a bytes-like object to ``path``, whole or not at all.

    Raises:
        OSError: the folder cannot be written or the disk is full; ``path`` is then unchanged.
    """
    with temporary(path) as partial:
        with partial.open("wb") as file:
            file.write(data)
        os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity become ``null``, which every reader accepts."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8", "backslashreplace"))  # JSON's own escape, for what UTF-8 cannot say


def finite(value: Any) -> Any:
    """``value`` with None for every NaN and infinity in it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


@contextmanager
def new_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that takes its name when the block ends without an exception.

    An exception (KeyboardInterrupt and SystemExit included) removes the temporary folder. A folder that
    already stands at ``path`` is replaced only after the new one is complete.

    Args:
        path: the folder to make.
        replace: whether a folder that is not empty may be replaced.

    Raises:
        OSError: the parent cannot be written, the disk is full, or something stands at ``path`` that is no folder or
            may not be replaced; ``path`` is then unchanged.
    """
    with temporary(path, folder=True) as partial:
        yield partial
        if replace and path.exists():
            _replace_folder(path, partial)
        else:
            os.rename(partial, path)


@contextmanager
def temporary(path: Path, folder: bool = False) -> Iterator[Path]:
    """A held sibling of ``path``, a new file or folder, which is gone afterwards: renamed by the block, or removed.

    Raises:
        OSError: the parent cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    lock = None
    while lock is None:  # another process may sweep between the making and the lock
        found = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        found.mkdir() if folder else found.touch(mode=0o644, exist_ok=False)
        lock = Lock.take(found, own=True)
    try:
        yield found
    finally:
        lock.remove()


def sweep(folder: Path, name: str = "") -> None:
    """Remove what killed processes left: temporary files and folders directly inside ``folder`` that nobody holds.

    Args:
        folder: where to look; it need not exist.
        name: only temporaries of this target.
    """
    try:
        found = [entry for entry in os.listdir(folder) if TEMPORARY.fullmatch(entry)]
    except OSError:
        return
    for entry in found:
        if not name or entry.startswith(f".{name}."):
            with suppress(OSError):
                lock = Lock.take(folder / entry)
                if lock is not None:
                    lock.remove()


def read_file(path: Path, limit: int, option: str) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        UserError: missing, not a regular file (a pipe would be waited for), too large, or unreadable.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{option}: '{path}' is no regular file.")
        if status.st_size > limit:
            raise UserError(f"{option}: '{path}' has {status.st_size:,} bytes; at most {limit:,} are read.")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{option}: no file at '{path}'.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: '{path}' cannot be read ({getattr(error, 'strerror', error)}).") from None


@contextmanager
def writable(place: Path, option: str) -> Iterator[None]:
    """Turn the ways in which a disk says no into one message that names ``option``, which chose the place.

    Raises:
        UserError: no space, or no access below ``place``.
    """
    try:
        yield
    except OSError as error:
        # Of the others, such as a lack of permission, only what happened here: reading fails in the same ways.
        if error.errno in FULL or str(error.filename or "").startswith(str(place)):
            raise cannot_write(place, option, error) from error
        raise


def cannot_write(place: Path, option: str, error: OSError | ValueError) -> UserError:
    """What ``writable`` raises."""
    why = getattr(error, "strerror", None) or error
    return UserError(f"{option}: cannot write below '{place}' ({why}). Free space there, or choose another folder.")


def check_writable(folder: Path, option: str) -> None:
    """Try the nearest existing parent of ``folder``; ``option`` is the one that chose it.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        with suppress(FileNotFoundError):
            os.stat(folder)  # a name that is too long, or a path that runs in circles
        parent = nearest_existing(folder)
        with temporary(parent / "writable"):
            pass
    except (OSError, ValueError) as error:
        raise cannot_write(folder, option, error) from None


def nearest_existing(path: Path) -> Path:
    """``path`` or its nearest parent that exists, absolute."""
    found = path.absolute()
    while not os.path.lexists(found) and found != found.parent:
        found = found.parent
    return found


def remove_empty_parents(folder: Path, until: Path) -> None:
    """Remove the parents of ``folder`` that are empty, up to but not including ``until``."""
    for parent in folder.absolute().parents:
        if parent == until or until not in parent.parents:
            return
        try:
            parent.rmdir()
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return


def _flock(handle: int, own: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        if not own:
            raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _replace_folder(path: Path, new: Path) -> None:
    # A full folder cannot be renamed over; it steps aside and comes back if the new one cannot take its place.
    with temporary(path, folder=True) as aside:
        os.replace(path, aside / path.name)
        try:
            os.replace(new, path)
        except BaseException:
            os.replace(aside / path.name, path)
            raise
