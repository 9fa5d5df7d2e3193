"""Importing this gives torch a device ``sim`` (``simulated.cpp`` says how) and puts every Lightning Trainer of the
process on it. So it is imported in processes of its own: ``main`` is what they run.

Needs a C++ compiler and ninja; what was compiled (17 s) is kept for the next time.
"""

import fcntl
import functools
import importlib
import itertools
import types
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.cpp_extension import load

from lightning_prune.calibration import stream_checkpoints
from lightning_prune.cli import main as command
from lightning_prune.support import devices

HERE = Path(__file__).parent
BUILD = HERE / ".build"
BUILD.mkdir(exist_ok=True)
with (BUILD / "held").open("w") as held:
    fcntl.flock(held, fcntl.LOCK_EX)
    (BUILD / "lock").unlink(missing_ok=True)  # torch's own, for which it waits for ever after a build that was killed
    device = load(
        "simulated_accelerator", [str(HERE / "simulated.cpp")], extra_cflags=["-O1"], build_directory=str(BUILD)
    )
torch.utils.rename_privateuse1_backend("sim")
SIM = torch.device("sim", 0)


class _Here:
    def __init__(self, index: Any = 0) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


module = types.ModuleType("torch.sim")
module.__dict__.update(
    is_available=lambda: True,
    is_initialized=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    set_device=lambda index: None,
    device=_Here,
    synchronize=lambda index=None: device.synchronize(),
    manual_seed=lambda seed: None,
    manual_seed_all=lambda seed: None,
    get_rng_state=lambda index=None: torch.get_rng_state(),
    set_rng_state=lambda state, index=None: None,
    get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
    _is_in_bad_fork=lambda: False,
    _lazy_init=lambda: None,
)
torch._register_device_module("sim", module)
# Its kernels are the CPU's, whose histogram takes no integers; transformers gives those to every other device.
_histc = torch.histc
torch.histc = lambda values, **options: _histc(values if values.is_floating_point() else values.float(), **options)  # type: ignore[assignment]
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


class SimAccelerator(CPUAccelerator):
    """Lightning's view of the one device, of which a strategy with a device of its own asks little."""

    def setup_device(self, device: torch.device) -> None: ...


def _on_sim(build: Any) -> Any:
    @functools.wraps(build)
    def init(self: Any, *args: Any, **options: Any) -> None:
        if options.get("accelerator", "auto") == "cpu":
            build(self, *args, **options)
            return
        options = {name: one for name, one in options.items() if name not in ("accelerator", "devices", "strategy")}
        build(self, *args, strategy=SingleDeviceStrategy(device=SIM, accelerator=SimAccelerator()), **options)

    return init


L.Trainer.__init__ = _on_sim(L.Trainer.__init__)  # type: ignore[method-assign]


def main(argv: list[str]) -> int:
    """A command line of the package; or ``call MODULE:FUNCTION STRING…``. Words before it:

    ``eager``: every step leaves a stream checkpoint. ``single``: the device has no float64.
    ``full MODULE:CLASS.METHOD N``: from its N-th call on, counted from 1, the device has no room for another tensor, as
    where another process takes it.
    """
    while argv[0] in ("eager", "full", "single"):
        if argv[0] == "single":
            device.set_has_double(False)
            devices.widest.cache_clear()  # what a run of this process found before
        elif argv[0] == "eager":
            stream_checkpoints.WAIT, stream_checkpoints.SHARE = 0.0, float("inf")
        else:
            _fill(argv[1], int(argv[2]))
        argv = argv[3 if argv[0] == "full" else 1 :]
    if argv[0] != "call":
        return command(argv)
    name, _, function = argv[1].partition(":")
    getattr(importlib.import_module(name), function)(*argv[2:])
    return 0


def _fill(call: str, number: int) -> None:
    module, _, path = call.partition(":")
    owner, name = path.split(".")
    kind = getattr(importlib.import_module(module), owner)
    real, seen = getattr(kind, name), itertools.count(1)

    def wrapper(*args: Any, **options: Any) -> Any:
        if next(seen) == number:
            device.set_limit(torch.accelerator.memory_allocated())
        return real(*args, **options)

    setattr(kind, name, wrapper)
