"""Copies that do not wait: the host waits before it reads what they write, and before it changes what they read."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_prune.calibration import residuals, stream_checkpoints
from lightning_prune.calibration.residuals import ResidualStore
from lightning_prune.calibration.stream_checkpoints import StreamCheckpoints
from lightning_prune.models.sources import Prefetching

Call = Callable[..., None]
SHAPE = (4, 3, 2)
VALUES = torch.arange(math.prod(SHAPE), dtype=torch.float32).view(SHAPE)


def _filled(folder: str, share: float) -> ResidualStore:
    residuals.SHARE = share  # 0: a mapped file
    sim = torch.device("sim", 0)
    store = ResidualStore(len(VALUES), Path(folder), sim)
    for start in range(len(VALUES)):
        store.put(slice(start, start + 1), VALUES[start : start + 1].to(sim))
    assert (store.pinned, share > 0) in ((True, True), (False, False))
    return store


def _stores(folder: str) -> None:
    for share in (0.25, 0.0):
        stream_checkpoints.WAIT, stream_checkpoints.SHARE = 0.0, float("inf")
        streams = StreamCheckpoints(Path(folder) / f"{share}")
        streams.offer(3, {"stream": _filled(folder, share)})
        assert torch.equal(streams.load()["stream"], VALUES)
        assert torch.equal(_filled(folder, share).get(slice(1, 3), torch.device("cpu")), VALUES[1:3])
        # And what a resumed run puts there comes from the host, between copies from and to the device.
        store = _filled(folder, share)
        read = store.get(slice(0, 4), torch.device("sim", 0))
        store.put(slice(0, 4), -VALUES)
        assert torch.equal(store.get(slice(0, 4), torch.device("sim", 0)).cpu(), -VALUES)
        assert torch.equal(read.cpu(), VALUES)


def test_the_host_reads_residual_streams_once_they_are_there(call: Call, tmp_path: Path) -> None:
    call(_stores, tmp_path)


class _Reused:
    """A source that gives the same memory for every name, as one that reads into a buffer would."""

    buffer = torch.zeros(3)

    def read(self, names: list[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        return {name: self.buffer.fill_(float(name)) for name in names}


def _prefetched() -> None:
    sim = torch.device("sim", 0)
    for pin in (True, False):
        if not pin:
            torch.Tensor.pin_memory = lambda self: self  # type: ignore[method-assign,assignment]
        reader = Prefetching(_Reused())  # type: ignore[arg-type]
        found = []
        for number in range(5):
            reader.announce([str(number)], None, sim)
            found.append(reader.read([str(number)], None, sim)[str(number)])
        reader.close()
        torch.accelerator.synchronize()
        assert [one.tolist() for one in found] == [[float(number)] * 3 for number in range(5)]


def test_parameters_read_ahead_arrive_whole(call: Call) -> None:
    call(_prefetched)
