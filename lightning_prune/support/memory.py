"""How much memory there is, on the host and on a device."""

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes() -> int:
    """Memory that this process may still take without swapping: what the system calls available, or what the
    container's limit leaves, whichever is less."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        pass
    return min(available, _container_bytes(available))


def free_bytes(device: torch.device) -> int:
    """The same for any device; for a GPU, what a limit set with ``set_per_process_memory_fraction`` leaves."""
    if device.type != "cuda":
        return free_host_bytes()
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - torch.cuda.memory_allocated(device)
    return max(0, min(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), allowed))


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process (``RssAnon``): what it allocated itself, without mapped files."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def memory_in_use() -> str:
    """This process's memory in words, that on a GPU beside it where it uses one."""
    text = f"{anonymous_bytes() / 2**20:,.0f} MiB"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        text += f", GPU {torch.cuda.memory_allocated() / 2**20:,.0f} MiB"
    return text


def keep_heaps_small() -> None:
    """Let blocks of 8 MiB and more have pages of their own, which go back to the system as soon as they are freed.

    By itself glibc moves that bound up to 32 MiB as blocks are freed. Smaller blocks stay in its heaps, where taking
    and freeing them costs nothing, until ``give_back_freed_memory``.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    _glibc("mallopt", mmap_threshold, 8 * 2**20)
    _glibc("mallopt", trim_threshold, 256 * 2**20)


def give_back_freed_memory() -> None:
    """Empty glibc's heaps: what a layer left there has holes that the next layer does not fit, and a walk over layers
    would hold twice what it uses."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        with suppress(OSError, AttributeError):
            getattr(ctypes.CDLL(None), function)(*arguments)


def _container_bytes(otherwise: int) -> int:
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = (CGROUP / "memory.current").read_text(encoding="ascii").strip()
        cached = 0
        for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines():
            if line.startswith("file "):  # page cache, which the kernel gives back
                cached = int(line.split()[1])
        return otherwise if limit == "max" else max(0, int(limit) - int(used) + cached)
    except (OSError, ValueError):
        return otherwise
