"""Files and folders that appear whole or not at all: written under ``.<name>.<random>.tmp`` beside their target, which
the writer holds with ``flock`` until the rename at the end. The system lets go of a lock however the process ends, so a
temporary file that nobody holds belongs to a process that was killed, and ``sweep`` may remove it."""

import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_prune.support.errors import UserError
from lightning_prune.support.regular_files import require_regular

TEMPORARY = re.compile(r"\..+\.tmp")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class Lock:
    """A file or folder that this process holds, exclusively, until it lets go or ends. Not ``filelock``, which holds
    neither a folder nor a file whose content it must keep."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self._handle = path, handle

    @classmethod
    def take(cls, path: Path, create: bool = False, own: bool = False) -> "Lock | None":
        """Hold a file or folder; None where another process does, or where it is gone or was replaced meanwhile.

        ``create`` makes an empty file if there is none. What is this process's ``own`` counts as held even where the
        file system has no locks: others cannot hold it there, and never take it to be dead.

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
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError as error:
            held = own and not isinstance(error, BlockingIOError)
        with suppress(OSError):
            # Whoever held it before may have removed it between the opening and the lock.
            if held and os.path.samestat(os.fstat(handle), os.stat(path)):
                return cls(path, handle)
        os.close(handle)
        return None

    def write(self, text: str) -> None:
        """Replace the held file's content."""
        os.truncate(self._handle, 0)
        os.pwrite(self._handle, text.encode(), 0)

    def release(self) -> None:
        """Release the lock and keep the file; calling it twice is harmless."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def remove(self) -> None:
        """Remove the file and release the lock; does nothing the second time."""
        if self._handle < 0:
            return
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)
        self.release()


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of ``text`` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: Any) -> None:
    """Write a bytes-like object to ``path``, whole or not at all: after an OSError it is unchanged."""
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
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def new_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that takes its name when the block ends without an exception, and is
    removed otherwise (KeyboardInterrupt and SystemExit included).

    Raises:
        OSError: it cannot be written, or ``path`` is not a folder, or not an empty one and ``replace`` is false.
    """
    with temporary(path, folder=True) as partial:
        yield partial
        if not (replace and path.exists()):
            os.rename(partial, path)
            return
        # A full folder cannot be renamed over; it steps aside and comes back if the new one cannot take its place.
        with temporary(path, folder=True) as aside:
            os.replace(path, aside / path.name)
            try:
                os.replace(partial, path)
            except BaseException:
                os.replace(aside / path.name, path)
                raise


@contextmanager
def temporary(path: Path, folder: bool = False) -> Iterator[Path]:
    """A held sibling of ``path``, a new file or folder, which is gone afterwards: renamed by the block, or removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    lock = partial = None
    try:  # from here on: a signal may come between the making and the lock
        while lock is None:  # another process may sweep in between
            partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            partial.mkdir() if folder else partial.touch(mode=0o644, exist_ok=False)
            lock = Lock.take(partial, own=True)
        assert partial is not None
        yield partial
    finally:
        if lock is not None:
            lock.remove()
        elif partial is not None:
            with suppress(OSError):
                partial.rmdir() if folder else partial.unlink()


def sweep(folder: Path, name: str = "") -> None:
    """Remove the temporary files and folders directly inside ``folder`` (of the target ``name``) that nobody holds:
    those of killed processes. The folder need not exist."""
    with suppress(OSError):
        for entry in os.listdir(folder):
            if TEMPORARY.fullmatch(entry) and (not name or entry.startswith(f".{name}.")):
                with suppress(OSError):
                    if (lock := Lock.take(folder / entry)) is not None:
                        lock.remove()


def read_file(path: Path, limit: int, option: str) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; UserError where there is none or it is unreadable."""
    if (size := require_regular(path, option)) > limit:
        raise UserError(f"{option}: '{path}' has {size:,} bytes; at most {limit:,} are read. Give another file.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{option}: cannot read '{path}' ({error.strerror}). Check its permissions.") from None


@contextmanager
def writable(place: Path, option: str) -> Iterator[None]:
    """Turn errors of the disk (no space, no access below ``place``) into a UserError that names ``option``."""
    try:
        yield
    except OSError as error:
        # Of other errors, such as a lack of permission, only those below ``place``: reading fails in the same ways.
        if error.errno in FULL or str(error.filename or "").startswith(str(place)):
            raise cannot_write(place, option, error) from error
        raise


def cannot_write(place: Path, option: str, error: OSError | ValueError) -> UserError:
    """Make the UserError that ``writable`` raises."""
    why = getattr(error, "strerror", None) or error
    return UserError(f"{option}: cannot write below '{place}' ({why}). Free space there, or choose another folder.")


def check_writable(folder: Path, option: str) -> None:
    """Raise UserError, which names ``option``, where nothing can be written to the nearest existing parent."""
    try:
        with suppress(FileNotFoundError):
            os.stat(folder)  # a name that is too long, or a path that runs in circles
        parts = (folder.absolute(), *folder.absolute().parents)
        with temporary(next(part for part in parts if os.path.lexists(part)) / "writable"):
            pass
    except (OSError, ValueError) as error:
        raise cannot_write(folder, option, error) from None


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make ``folder`` and its parents (OSError, or ValueError where no path has such a name); those that are new are
    removed after the block if they are empty."""
    new = [part for part in (folder.absolute(), *folder.absolute().parents) if not os.path.lexists(part)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for part in new:
            with suppress(OSError, ValueError):
                part.rmdir()
