"""A loop that was killed continues where it was: nothing half-written is believed, nothing known is made again."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.loop import CalibrationLoop
from lightning_prune.calibration.passes import Pass
from lightning_prune.calibration.results import Results
from lightning_prune.models.families import count_parameters, layer_structures
from lightning_prune.models.vocabulary import Block
from tests.calibration.driving import drive
from tests.cutting import layered
from tests.methods.behaviour import EACH_PASS, SYSTEMS, trainer_for
from tests.tiny import make_tiny, tiny_tokens

TOKENS = tiny_tokens(5, 12)


def passes_of(system: str, root: Path) -> list[Pass]:
    """The passes that the method makes over the tiny model."""
    method = SYSTEMS[system].make(pretrained="not read", pruning_ratio=0.29)
    net = make_tiny()
    method.trainer = trainer_for(method, root)
    method.layers, method.dense_parameters = layer_structures(net), count_parameters(net)
    return method.passes()


def finishes(passes: Sequence[Pass]) -> list[str]:
    """Notes every step that is concluded, as it happens."""
    made: list[str] = []
    for current in passes:

        def finish(step: Any, current: Pass = current, real: Any = current.finish) -> Any:
            made.append(f"{current.name} {step.layer} {step.phase}")
            return real(step)

        current.finish = finish  # type: ignore[method-assign]
    return made


def everything(loop: CalibrationLoop) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Every result in order, and every layer's new weights."""
    results = [loop.results.of(number) for number in range(len(loop.steps))]
    parts: list[tuple[dict[str, Tensor], dict[str, Any]]] = [
        ({str(block): values for block, values in result.importance.items()}, result.facts) for result in results
    ]
    return parts + [(loop.new_parameters_of(layer), {}) for layer in range(4)]


def assert_same(loop: CalibrationLoop, other: CalibrationLoop) -> None:
    """Equal to the last bit."""
    for (tensors, facts), (theirs, their_facts) in zip(everything(loop), everything(other), strict=True):
        assert facts == their_facts
        assert tensors.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors.items())


@functools.cache
def undisturbed(system: str) -> CalibrationLoop:
    """All passes of the system with one layer at a time, made once and compared with by many tests."""
    scratch = Path(tempfile.gettempdir())
    return drive(passes_of(system, scratch), layered(make_tiny(), onload="layer"), TOKENS, scratch)


@pytest.mark.parametrize("system", EACH_PASS)
def test_a_killed_loop_continues_at_the_first_unknown_step_to_the_same_bits(tmp_path: Path, system: str) -> None:
    """Wherever the weights are; and a loop that is finished reads no layer again."""
    total = len(undisturbed(system).steps)
    kills: tuple[tuple[int, Any], ...] = ((1, "model"), (total // 2, "layer"), (total - 1, "model"), (total, "layer"))
    for done, onload in kills:
        folder = tmp_path / f"results-{done}"
        first, again = passes_of(system, tmp_path), passes_of(system, tmp_path)
        before, after = finishes(first), finishes(again)
        drive(first, layered(make_tiny(), onload=onload), TOKENS, tmp_path, folder=folder, stop_after=done)
        assert len(before) == done
        known = {path.name: path.read_bytes() for path in folder.iterdir()}

        model = layered(make_tiny(), onload=onload)
        read = model.bytes_read
        loop = drive(again, model, TOKENS, tmp_path, folder=folder)
        assert len(after) == total - done
        assert not set(before) & set(after)
        assert done < total or model.bytes_read == read
        assert all((folder / name).read_bytes() == content for name, content in known.items())
        assert_same(loop, undisturbed(system))


def test_a_result_is_read_back_as_it_was(tmp_path: Path) -> None:
    result = LayerResult(
        {Block.MLP: torch.tensor([0.1, 0.2], dtype=torch.float64), Block.LAYER: torch.ones(1)},
        {"down": torch.randn(2, 3).bfloat16()},
        {"output": torch.randn(3)},
        {"damping": 0.1, "kept": [0, 2], "delta": [float("nan"), 1e-300]},
        {"output": torch.randn(3, 3)},
    )
    (tmp_path / "file").write_bytes(result.to_bytes())
    again = LayerResult.from_file(tmp_path / "file")
    assert again.importance.keys() == result.importance.keys()
    assert all(torch.equal(again.importance[block], result.importance[block]) for block in result.importance)
    assert again.new_parameters.keys() == {"down", "output.bias"}
    assert all(torch.equal(again.new_parameters[name], result.new_parameters[name]) for name in again.new_parameters)
    assert again.weights["down"].dtype == torch.bfloat16
    assert torch.equal(again.factors["output"], result.factors["output"])
    assert repr(again.facts) == repr(result.facts)


def test_damaged_files_are_made_again_and_new_weights_stay_on_disk(tmp_path: Path) -> None:
    results = Results(tmp_path / "f")
    for step in range(3):
        results.add(step, LayerResult({Block.MLP: torch.full((8,), float(step))}, {"down": torch.ones(4, 4)}))
    assert not results.of(0).weights
    whole = (tmp_path / "f" / "step_00001.safetensors").read_bytes()
    (tmp_path / "f" / "step_00001.safetensors").write_bytes(whole[:-5])
    (tmp_path / "f" / "step_00002.safetensors").write_bytes(b"")
    again = Results(tmp_path / "f")
    assert [step in again for step in range(3)] == [True, False, False]
    assert torch.equal(again.whole(0).weights["down"], torch.ones(4, 4))
    assert again.whole(1).importance == {}


def test_in_a_run_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    loop = drive(passes_of("slimgpt", tmp_path), layered(make_tiny()), TOKENS, tmp_path)
    assert loop.new_parameters_of(2).keys() == {"output", "down"}
    assert not list(tmp_path.iterdir())
