"""Sizes in bytes, and the memory of the host."""

import ctypes
import platform
import re
from contextlib import suppress
from pathlib import Path

import psutil

from lightning_prune.support.errors import UserError

CGROUP = Path("/sys/fs/cgroup")


def parse_bytes(text: str, option: str) -> int:
    """Bytes of a size as people write it: ``24GiB``, ``80GB``, ``512 MiB``, ``1024``; UserError for anything else."""
    match, size = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([KMGT])(I?))?B?", text.strip().upper()), 0.0
    if match is not None:
        size = float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2]) if match[2] else 0)
    if size < 1:
        raise UserError(f"{option}: found '{text}'; give a size such as 24GiB, 80GB or 512MiB.")
    return int(size)


def free_host_bytes() -> int:
    """Memory that this process may still take without swapping: what the system calls available, or what the
    container's limit allows, whichever is less."""
    available: int = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        counters = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        # The page cache counts as used, but the kernel gives it back.
        return min(available, max(0, limit - used + int(counters.get("file", 0))))
    except (OSError, ValueError):  # no such files, or no limit: "max"
        return available


def anonymous_bytes() -> int:
    """Resident memory that this process allocated itself, without mapped files."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def keep_heaps_small() -> None:
    """Let blocks of 8 MiB and more have pages of their own, which go back to the system as soon as they are freed; by
    itself glibc raises that bound to 32 MiB. Smaller blocks are kept until ``give_back_freed_memory``."""
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    _glibc("mallopt", mmap_threshold, 8 * 2**20)
    _glibc("mallopt", trim_threshold, 256 * 2**20)


def give_back_freed_memory() -> None:
    """Empty glibc's heaps: what a layer left there has holes that the next one does not fit. Without it a pass over
    the layers holds twice what it uses (measured)."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        with suppress(OSError, AttributeError):
            getattr(ctypes.CDLL(None), function)(*arguments)
