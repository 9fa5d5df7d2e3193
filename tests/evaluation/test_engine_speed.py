import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_prune.cli import main
from lightning_prune.evaluation import engine_speed
from lightning_prune.evaluation.efficiency import WARM_UP, Setting, measure
from lightning_prune.evaluation.engine_speed import measure_in_engine
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.support.errors import UserError
from tests.cutting import cut
from tests.tiny import make_tiny, mixed_plan

CPU = torch.device("cpu")


class Clock:
    """Time passes while the engine runs: 2 s of prefill and 0.5 s a token behind the first; 100 s to warm up."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked: list[tuple[list[list[int]], int]] = []

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        self.asked.append((prompts, tokens))
        self.now += 2 + 0.5 * (tokens - 1) + (100 if len(self.asked) <= 2 * WARM_UP else 0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()

    @contextmanager
    def opened(*_: Any) -> Iterator[Clock]:
        yield found

    monkeypatch.setattr(engine_speed, "_vllm", opened)
    monkeypatch.setattr(engine_speed, "engine_version", lambda name: f"{name} 1.0")
    monkeypatch.setattr(engine_speed, "time", SimpleNamespace(perf_counter=lambda: found.now))
    return found


def test_decoding_is_what_more_tokens_take_beyond_the_first(clock: Clock, tmp_path: Path) -> None:
    make_tiny().save_pretrained(tmp_path)
    setting = Setting(prompt_length=10, decode_length=6, context_length=16, batch_sizes=(3,), repeats=2)
    found = measure_in_engine("vllm", Checkpoint.open(str(tmp_path)), setting, torch.float32, CPU)
    (speed,) = found.speed
    assert speed.prefill_tokens_per_second == 3 * 10 / 2
    assert speed.decode_tokens_per_second == 3 * 6 / 3
    assert [tokens for _, tokens in clock.asked] == [1, 7] * (WARM_UP + 2)
    assert {(len(prompts), len(prompts[0])) for prompts, _ in clock.asked} == {(3, 10)}
    assert len({tuple(map(tuple, prompts)) for prompts, _ in clock.asked}) == len(clock.asked)  # nothing is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_those_of_the_loaded_model(clock: Clock, dtype: torch.dtype, tmp_path: Path) -> None:
    model = cut(make_tiny(), mixed_plan(make_tiny())).to(dtype)
    model.save_pretrained(tmp_path)
    setting = Setting(prompt_length=4, decode_length=2, context_length=6, batch_sizes=(1,), repeats=1)
    expected = measure(model, Checkpoint.open(str(tmp_path)), setting)
    found = measure_in_engine("vllm", Checkpoint.open(str(tmp_path)), setting, dtype, CPU)
    for name in ("parameters", "macs_per_token", "kv_cache_bytes_per_token", "weight_file_bytes", "weight_file_dtype"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize(("name", "module"), [("vllm", "vllm"), ("llamacpp", "xllamacpp")])
def test_engine_that_is_not_installed_is_named(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    make_tiny().save_pretrained(tmp_path / "model")
    options = ["--efficiency", "--engine", name, "--output", str(tmp_path / "out")]
    assert main(["evaluate", "--model", str(tmp_path / "model"), *options]) == 2
    assert f"--engine {name} needs the package '{module}'" in capsys.readouterr().err


def test_model_that_an_engine_refuses_is_one_sentence() -> None:
    with (
        pytest.raises(UserError, match=r"--engine vllm does not take 'folder' \(ValueError: no\)"),
        engine_speed._refusals("vllm", "folder"),
    ):
        raise ValueError("no\nand a page more")
