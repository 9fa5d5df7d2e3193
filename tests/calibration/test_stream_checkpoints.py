"""A pass that was killed goes on at its waypoint, with the bits of an undisturbed one."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_prune.calibration import stream_checkpoints as module
from lightning_prune.calibration.residuals import ResidualStore
from lightning_prune.calibration.results import Findings
from lightning_prune.calibration.stream_checkpoints import Waypoints
from tests.calibration.driving import drive
from tests.calibration.test_results import passes_of
from tests.cutting import layered
from tests.methods.behaviour import SYSTEMS
from tests.tiny import make_tiny, tiny_tokens

TOKENS = tiny_tokens(5, 12)
READING = [name for name in SYSTEMS if name != "magnitude"]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is worth a waypoint."""
    monkeypatch.setattr(module, "WAIT", 0.0)
    monkeypatch.setattr(module, "SHARE", float("inf"))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("system", READING)
def test_what_is_behind_a_waypoint_is_not_walked_again(system: str, tmp_path: Path) -> None:
    model = layered(make_tiny(), onload="layer")
    whole = drive(passes_of(system, tmp_path), model, TOKENS, tmp_path)
    undisturbed, steps = model.evaluations, len(whole)
    for stop in range(1, steps):
        folder = tmp_path / f"findings {stop}"
        first = layered(make_tiny(), onload="layer")
        drive(
            passes_of(system, tmp_path),
            first,
            TOKENS,
            tmp_path,
            findings=Findings(folder),
            waypoints=Waypoints(folder),
            stop_after=stop,
        )
        again = layered(make_tiny(), onload="layer")
        walk = drive(
            passes_of(system, tmp_path), again, TOKENS, tmp_path, findings=Findings(folder), waypoints=Waypoints(folder)
        )
        assert first.evaluations + again.evaluations == undisturbed, f"killed behind step {stop}"
        for number in range(steps):
            expected, found = whole.findings.of(number), walk.findings.of(number)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[name], found[name]) for name in expected)
            new, old = walk.findings.weights(number), whole.findings.weights(number)
            assert all(torch.equal(old[role], new[role]) for role in old)
        assert not list(folder.glob("streams_*"))


def _store(folder: Path, rows: int = 4) -> ResidualStore:
    store = ResidualStore(rows, folder)
    store.put(slice(0, rows), torch.ones(rows, 3, 2))
    return store


@pytest.mark.usefixtures("eager")
def test_the_newest_stays_and_a_damaged_one_is_forgotten(tmp_path: Path) -> None:
    waypoints = Waypoints(tmp_path)
    for step in (2, 3):
        waypoints.offer(step, {"stream": _store(tmp_path)})
    (file,) = tmp_path.iterdir()
    again = Waypoints(tmp_path)
    assert again.step == 3
    assert torch.equal(again.load()["stream"], torch.ones(4, 3, 2))
    file.write_bytes(file.read_bytes()[:100])
    assert Waypoints(tmp_path).step == -1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("eager")
def test_a_damaged_finding_before_a_waypoint_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "findings"

    def walk(stop: int | None) -> object:
        return drive(
            passes_of("wanda", tmp_path),
            layered(make_tiny(), onload="layer"),
            TOKENS,
            tmp_path,
            findings=Findings(folder),
            waypoints=Waypoints(folder),
            stop_after=stop,
        )

    walk(3)
    (folder / "step_00001.safetensors").write_bytes(b"")
    walk(None)
    assert len(Findings(folder)) == len(drive(passes_of("wanda", tmp_path), layered(make_tiny()), TOKENS, tmp_path))


def test_little_work_is_not_worth_a_waypoint(tmp_path: Path) -> None:
    waypoints = Waypoints(tmp_path)
    waypoints.begin()
    waypoints.offer(0, {"stream": _store(tmp_path)})
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("eager")
def test_a_disk_that_is_almost_full_keeps_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300))
    Waypoints(tmp_path).offer(0, {"stream": _store(tmp_path)})
    assert not list(tmp_path.iterdir())
