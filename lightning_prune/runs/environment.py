"""Where a run happened: software versions, hardware, precision. Enough for a paper's appendix."""

import importlib.metadata
import os
import platform
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lightning_prune import __version__
from lightning_prune.support.devices import accelerators, peak_bytes, runtime_version

PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "datasets", "torchmetrics", "safetensors", "numpy")


def environment(precision: str, device: torch.device) -> dict[str, Any]:
    """The contents of ``environment.json``. Memory in bytes."""
    return {
        "python": platform.python_version(),
        "packages": {"lightning-prune": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "cpu": {"name": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": accelerators(),
        "cuda": runtime_version(),
        "device": str(device),
        "precision": precision,
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
    }


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the accelerator where one is used, resident set otherwise."""
    if peak := peak_bytes():
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cpu_name() -> str:
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if model := re.search(r"^model name\s*:\s*(.+)", text, re.MULTILINE):
            return model[1].strip()
    return platform.processor() or platform.machine()
