"""The one place that asks about devices. CUDA, ROCm, XPU and MPS take the same path: what torch calls the accelerator.
Copies to and from pinned memory do not wait for themselves: the host has to ``wait`` before it reads what such a copy
writes or changes what it reads; on the device itself copies and kernels keep their order."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import psutil
import torch
from torch import Tensor

from lightning_prune.support.memory import anonymous_bytes, free_host_bytes

CPU = torch.device("cpu")


def accelerator() -> torch.device | None:
    """The kind of accelerator that is here, without an index."""
    return torch.accelerator.current_accelerator(check_available=True)


def wait(device: torch.device) -> None:
    """Wait until everything that ``device`` was given is done, copies included."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Kernels that give the same bits every time, where an accelerator has them: attention's backward adds in any order
    unless torch is told so. Beyond CUDA and ROCm torch warns of an operation without one, and promises nothing."""
    if device.type == "cpu" or torch.are_deterministic_algorithms_enabled():  # the user's own wish comes first
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses its matrix products without
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cuda")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@cache
def can_pin(device: torch.device) -> bool:
    """Whether host memory can be pinned for ``device``."""
    if device.type in ("cpu", "mps"):  # of MPS, its memory is the host's, and torch cannot pin there
        return False
    try:
        return torch.empty(1, pin_memory=True).is_pinned()
    except RuntimeError:
        return False


@cache
def widest(device: torch.device) -> torch.dtype:
    """float64, or fp32 on an accelerator that cannot compute in it, as MPS and some of XPU's."""
    try:
        return (torch.ones(1, dtype=torch.float64, device=device) + 1).cpu().dtype
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return torch.float32


def widened(values: Tensor) -> Tensor:
    """``values`` in the ``widest`` dtype of their device."""
    return values.to(widest(values.device))


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take on ``device``: on the host without swapping, on an accelerator within
    what ``set_per_process_memory_fraction`` allows."""
    if device.type == "cpu":
        return free_host_bytes()
    try:
        free, total = torch.accelerator.get_memory_info(device)
    except RuntimeError:  # one that does not say: it shares the host's memory
        return free_host_bytes()
    allocated, reserved = torch.accelerator.memory_allocated(device), torch.accelerator.memory_reserved(device)
    share = getattr(torch.get_device_module(device), "get_per_process_memory_fraction", lambda _: 1.0)(device)
    return max(0, min(free + reserved - allocated, int(total * share) - allocated))


def allocated_bytes() -> int:
    """Bytes that this process holds on the current accelerator; 0 where there is none or it does not say."""
    return _memory(torch.accelerator.memory_allocated)


def peak_bytes() -> int:
    """Largest number of bytes that this process held on the accelerator since ``reset_peak``."""
    return _memory(torch.accelerator.max_memory_allocated)


def reset_peak() -> None:
    """Free what is cached on the current accelerator, and count its peak from here."""
    for reset in (torch.accelerator.empty_cache, torch.accelerator.reset_peak_memory_stats):
        _memory(reset)


def _memory(ask: Callable[[], int | None]) -> int:
    try:
        return 0 if accelerator() is None else int(ask() or 0)
    except RuntimeError:
        return 0


def memory_in_use() -> str:
    """Memory of this process in words, that on an accelerator beside it where it uses one."""
    text = f"{anonymous_bytes() / 2**20:,.0f} MiB"
    return f"{text}, GPU {held / 2**20:,.0f} MiB" if (held := allocated_bytes()) else text


def accelerators() -> list[dict[str, str | int]]:
    """``name`` and ``memory_bytes`` of every accelerator here; the host's memory where one has none of its own."""
    if (kind := accelerator()) is None:
        return []
    properties = getattr(torch.get_device_module(kind), "get_device_properties", lambda _: None)
    memory = psutil.virtual_memory().total
    return [
        {"name": str(getattr(one, "name", kind.type)), "memory_bytes": int(getattr(one, "total_memory", memory))}
        for one in map(properties, range(torch.accelerator.device_count()))
    ]


def runtime_version() -> str | None:
    """Version of CUDA, or ``ROCm …``, ``XPU …``; None in a build of torch for none of these."""
    names = {"ROCm": getattr(torch.version, "hip", None), "XPU": getattr(torch.version, "xpu", None)}
    return torch.version.cuda or next((f"{name} {version}" for name, version in names.items() if version), None)
