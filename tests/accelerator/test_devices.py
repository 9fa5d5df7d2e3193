"""What the package knows of the simulated device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune.methods.taylor import TaylorPass
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import open_layered
from lightning_prune.support import devices
from tests.calibration.driving import drive
from tests.methods.behaviour import save_model
from tests.tiny import tiny_tokens

Call = Callable[..., None]
MIB = 2**20


def _asked() -> None:
    from tests.accelerator import simulated  # where this runs, it is there

    sim = torch.device("sim", 0)
    assert devices.accelerator() == torch.device("sim")
    assert devices.can_pin(sim)
    (one,) = devices.accelerators()
    assert one["name"] == "sim"
    before, held = devices.free_bytes(sim), devices.allocated_bytes()  # by the run that this process is a fork of
    devices.reset_peak()
    values = torch.zeros(MIB, device=sim)
    assert before - devices.free_bytes(sim) == devices.allocated_bytes() - held == 4 * MIB
    assert f"GPU {4:,.0f} MiB" in devices.memory_in_use()
    del values
    assert (devices.allocated_bytes(), devices.peak_bytes()) == (held, held + 4 * MIB)
    devices.reset_peak()
    assert devices.peak_bytes() == held
    assert (devices.widest(sim), devices.widest(devices.CPU)) == (torch.float64, torch.float64)
    devices.widest.cache_clear()
    simulated.device.set_has_double(False)
    assert devices.widest(sim) == torch.float32
    with pytest.raises(TypeError, match="float64"):
        torch.ones(2, device=sim).double()
    assert devices.widened(torch.ones(2, device=sim)).dtype == torch.float32


def test_memory_is_asked_of_the_device(call: Call) -> None:
    call(_asked)


def _differentiated(folder: str) -> None:
    asked = []
    backward: Any = torch.autograd.backward

    def watched(*args: Any, **options: Any) -> None:
        asked.append(torch.are_deterministic_algorithms_enabled())
        backward(*args, **options)

    torch.autograd.backward = watched
    model = open_layered(Checkpoint.open(folder), torch.float32, torch.device("sim", 0))
    tokens = tiny_tokens(4, 9)
    drive([TaylorPass()], model, tokens, Path(folder))
    assert len(asked) == 2 * model.num_layers  # batches of two
    assert all(asked)
    assert not torch.are_deterministic_algorithms_enabled()


def test_gradients_are_asked_for_without_chance(call: Call, tmp_path: Path) -> None:
    call(_differentiated, save_model(tmp_path / "model"))
