"""A pass that was killed continues at its stream checkpoint, with the bits of an undisturbed one."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_prune.calibration import stream_checkpoints as module
from lightning_prune.calibration.residuals import ResidualStore
from lightning_prune.calibration.stream_checkpoints import StreamCheckpoints
from tests.calibration.driving import drive
from tests.calibration.test_results import TOKENS, assert_same, passes_of, undisturbed
from tests.cutting import layered
from tests.methods.behaviour import EACH_PASS
from tests.tiny import make_tiny


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is worth a stream checkpoint."""
    monkeypatch.setattr(module, "WAIT", 0.0)
    monkeypatch.setattr(module, "SHARE", float("inf"))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("system", EACH_PASS)
def test_what_comes_before_a_stream_checkpoint_is_not_run_again(system: str, tmp_path: Path) -> None:
    whole = undisturbed(system)
    evaluations, steps = whole.setting.model.evaluations, len(whole.steps)
    for stop in sorted({1, steps // 3, steps // 2, steps - 1} - {0}):
        folder = tmp_path / f"results {stop}"
        first, again = layered(make_tiny(), onload="layer"), layered(make_tiny(), onload="layer")
        drive(passes_of(system, tmp_path), first, TOKENS, tmp_path, folder=folder, streams=True, stop_after=stop)
        loop = drive(passes_of(system, tmp_path), again, TOKENS, tmp_path, folder=folder, streams=True)
        assert first.evaluations + again.evaluations == evaluations, f"killed after step {stop}"
        assert_same(loop, whole)
        assert not list(folder.glob("streams*"))


def _store(folder: Path, rows: int = 4) -> ResidualStore:
    store = ResidualStore(rows, folder)
    store.put(slice(0, rows), torch.ones(rows, 3, 2))
    return store


@pytest.mark.usefixtures("eager")
def test_the_newest_stays_and_a_damaged_one_is_forgotten(tmp_path: Path) -> None:
    streams = StreamCheckpoints(tmp_path)
    for step in (2, 3):
        streams.offer(step, {"stream": _store(tmp_path)})
    (file,) = tmp_path.iterdir()
    again = StreamCheckpoints(tmp_path)
    assert again.step == 3
    assert torch.equal(again.load()["stream"], torch.ones(4, 3, 2))
    file.write_bytes(file.read_bytes()[:100])
    assert StreamCheckpoints(tmp_path).step == -1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("eager")
def test_a_damaged_result_before_a_stream_checkpoint_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    for stop in (3, None):
        model = layered(make_tiny(), onload="layer")
        loop = drive(
            passes_of("wanda", tmp_path), model, TOKENS, tmp_path, folder=folder, streams=True, stop_after=stop
        )
        (folder / "step_00001.safetensors").write_bytes(b"") if stop else None
    assert all(step in loop.results for step in range(len(loop.steps)))


@pytest.mark.parametrize(("wait", "free"), [(10.0, 10**9), (0.0, 300)])
def test_little_work_or_an_almost_full_disk_keeps_none(
    wait: float, free: int, tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT", wait)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    StreamCheckpoints(tmp_path).offer(0, {"stream": _store(tmp_path)})
    assert not list(tmp_path.iterdir())
