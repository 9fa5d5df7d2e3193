"""A walk that was killed goes on where it was: nothing half-written is believed, nothing known is made again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_prune.calibration.loop import Walk
from lightning_prune.calibration.passes import Pass
from lightning_prune.calibration.results import Findings
from lightning_prune.models.families import anatomy, count_parameters
from lightning_prune.support import files
from tests.calibration.driving import drive
from tests.cutting import layered
from tests.methods.behaviour import SYSTEMS, trainer_for
from tests.tiny import make_tiny, tiny_tokens

TOKENS = tiny_tokens(5, 12)


def passes_of(system: str, root: Path) -> list[Pass]:
    """The passes that the method makes over the tiny model."""
    method = SYSTEMS[system].make(pretrained="not read", pruning_ratio=0.29)
    net = make_tiny()
    method.trainer = trainer_for(method, root)
    method._views, method.dense_parameters = anatomy(net), count_parameters(net)
    return method.passes()


def finishes(passes: Sequence[Pass]) -> list[str]:
    """Notes every step that is concluded, as it happens."""
    made: list[str] = []
    for one in passes:

        def finish(step: Any, one: Pass = one, real: Any = one.finish) -> Any:
            made.append(f"{one.name} {step.layer} {step.phase}")
            return real(step)

        one.finish = finish  # type: ignore[method-assign]
    return made


def everything(walk: Walk) -> list[Tensor]:
    """Every finding and every new weight, in order."""
    found = [walk.findings.of(number) for number in range(len(walk))] + [walk.weights_of(layer) for layer in range(4)]
    return [tensor for finding in found for _, tensor in sorted(finding.items())]


@pytest.mark.parametrize("onload", ["layer", "model"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_killed_walk_goes_on_at_the_first_unknown_step_to_the_same_bits(
    tmp_path: Path, system: str, onload: Any
) -> None:
    undisturbed = drive(passes_of(system, tmp_path), layered(make_tiny(), onload=onload), TOKENS, tmp_path)
    expected = everything(undisturbed)
    total = len(undisturbed)
    assert expected
    for done in sorted({1, 2, total // 2, total - 1}):
        folder = tmp_path / f"findings-{done}"
        first = passes_of(system, tmp_path)
        before = finishes(first)
        model = layered(make_tiny(), onload=onload)
        drive(first, model, TOKENS, tmp_path, findings=Findings(folder), stop_after=done)
        assert len(before) == done
        known = {path.name: path.read_bytes() for path in folder.iterdir()}

        again = passes_of(system, tmp_path)
        after = finishes(again)
        model = layered(make_tiny(), onload=onload)
        walk = drive(again, model, TOKENS, tmp_path, findings=Findings(folder))
        assert len(after) == total - done
        assert not set(before) & set(after)
        assert all((folder / name).read_bytes() == content for name, content in known.items())
        found = everything(walk)
        assert len(found) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), done


@pytest.mark.parametrize("system", ["wanda", "slimgpt", "hgsp_taylor"])
def test_a_finished_walk_reads_no_layer_again(tmp_path: Path, system: str) -> None:
    expected = everything(
        drive(passes_of(system, tmp_path), layered(make_tiny()), TOKENS, tmp_path, findings=Findings(tmp_path / "f"))
    )
    model = layered(make_tiny())
    read = model.bytes_read
    walk = drive(passes_of(system, tmp_path), model, TOKENS, tmp_path, findings=Findings(tmp_path / "f"))
    assert model.bytes_read == read
    assert all(torch.equal(one, other) for one, other in zip(everything(walk), expected, strict=True))


@pytest.mark.parametrize("known", [0, 1, 3])
def test_what_was_killed_before_the_rename_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: int
) -> None:
    folder, calls = tmp_path / "findings", []

    class Killed(BaseException):
        pass

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) > known:
            raise Killed
        Path(source).rename(target)

    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr(files.Lock, "remove", files.Lock.release)  # a killed process tidies nothing up
    with pytest.raises(Killed):
        drive(passes_of("slimgpt", tmp_path), layered(make_tiny()), TOKENS, tmp_path, findings=Findings(folder))
    monkeypatch.undo()
    assert [path for path in folder.iterdir() if path.suffix == ".tmp"]
    findings = Findings(folder)
    assert [step in findings for step in range(5)] == [step < known for step in range(5)]
    assert len(findings) == known
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]


def test_damaged_files_are_made_again(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "f")
    for step in range(3):
        findings.add(step, {"score": torch.full((8,), float(step)), "weight.down": torch.ones(4, 4)})
    whole = (tmp_path / "f" / "step_00001.safetensors").read_bytes()
    (tmp_path / "f" / "step_00001.safetensors").write_bytes(whole[:-5])
    (tmp_path / "f" / "step_00002.safetensors").write_bytes(b"")
    again = Findings(tmp_path / "f")
    assert [step in again for step in range(3)] == [True, False, False]
    assert again.of(0).keys() == {"score"}
    assert torch.equal(again.weights(0)["down"], torch.ones(4, 4))
    again.remove()
    assert not (tmp_path / "f").exists()


def test_new_weights_stay_on_disk_where_there_is_a_folder(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "f")
    findings.add(0, {"weight.down": torch.ones(4, 4), "score": torch.zeros(2)})
    assert not findings._weights
    save_file({**load_file(tmp_path / "f" / "step_00000.safetensors"), "weight.down": torch.zeros(4, 4)},
              tmp_path / "f" / "step_00000.safetensors")  # fmt: skip
    assert not bool(findings.weights(0)["down"].any())


def test_in_a_run_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    walk = drive(passes_of("slimgpt", tmp_path), layered(make_tiny()), TOKENS, tmp_path / "scratch")
    assert walk.weights_of(2).keys() == {"output", "down"}
    assert not (tmp_path / "scratch").exists() or not list((tmp_path / "scratch").iterdir())
