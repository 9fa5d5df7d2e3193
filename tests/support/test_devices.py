"""What is asked about devices, where there is no accelerator; ``tests/accelerator`` asks a simulated one."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lightning_prune.support import devices

PACKAGE = Path(__file__).parents[2] / "lightning_prune"
KINDS = [torch.device(kind) for kind in ("cuda", "xpu", "mps")]


def test_one_module_alone_names_kinds_of_accelerator() -> None:
    words = ("torch.cuda", "torch.xpu", "torch.mps", "is_cuda", "torch.accelerator", "non_blocking=True", '== "cuda"')
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "devices.py"]
    found = [f"{path.name}: {word}" for path in files for word in words if word in path.read_text(encoding="utf-8")]
    assert found == []


def test_without_an_accelerator_there_is_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    # A build of torch for CUDA on a machine without a GPU: it knows the kind, and asking for memory raises.
    for kind in (None, torch.device("cuda")):
        monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda kind=kind: kind)
        assert devices.accelerator() is None
        assert devices.accelerators() == []
        assert devices.allocated_bytes() == devices.peak_bytes() == 0
        devices.reset_peak()
        assert "GPU" not in devices.memory_in_use()
    devices.wait(devices.CPU)
    assert not devices.can_pin(devices.CPU)


def test_a_device_that_does_not_say_what_is_free_shares_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(device: torch.device) -> tuple[int, int]:
        raise NotImplementedError("getMemoryInfo is not implemented for this allocator yet.")

    monkeypatch.setattr(torch.accelerator, "get_memory_info", unknown)
    monkeypatch.setattr(devices, "free_host_bytes", lambda: 123)
    assert devices.free_bytes(torch.device("mps")) == 123


@pytest.mark.parametrize(("share", "free"), [(1.0, 700 + 300 - 200), (0.5, 500 - 200), (0.1, 0)])
def test_free_memory_counts_what_is_cached_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, share: float, free: int
) -> None:
    for name, value in {"get_memory_info": (700, 1000), "memory_reserved": 300, "memory_allocated": 200}.items():
        monkeypatch.setattr(torch.accelerator, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share)
    assert devices.free_bytes(torch.device("cuda", 0)) == free


@pytest.mark.parametrize("device", [devices.CPU, *KINDS], ids=str)
def test_deterministic_kernels_are_asked_for_and_given_back(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    torch.use_deterministic_algorithms(False)  # a Trainer of an earlier test may have set it for the whole process
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with suppress(ZeroDivisionError), devices.deterministic(device):
        asked = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        assert asked == (device.type != "cpu", device.type in ("xpu", "mps"))
        assert (os.environ.get("CUBLAS_WORKSPACE_CONFIG") == ":4096:8") is (device.type != "cpu")
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with devices.deterministic(device):
            assert torch.is_deterministic_algorithms_warn_only_enabled()  # as the user set it
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
