import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lightning_prune
from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.cli import main as command
from lightning_prune.cli.commands.apply import main
from lightning_prune.models.checkpoint import Checkpoint
from tests.cutting import cut, layered_cut
from tests.tiny import make_tiny, mixed_plan, tiny_tokenizer, tiny_tokens, uniform_plan


@pytest.fixture
def base(tiny_checkpoint: Callable[..., Path]) -> Path:
    folder = tiny_checkpoint()
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def plan() -> PruningPlan:
    return mixed_plan(make_tiny())


def arguments(base: Path, plan: PruningPlan, tmp_path: Path, output: Path | None = None) -> list[str]:
    plan.save(tmp_path / "plan.json")
    return ["--plan", str(tmp_path / "plan.json"), "--model", str(base), "--output", str(output or tmp_path / "out")]


@pytest.mark.parametrize("make_plan", [mixed_plan, uniform_plan])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_checkpoint_is_byte_identical_to_the_one_the_run_wrote(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str, make_plan: Callable
) -> None:
    plan = make_plan(make_tiny(), dtype=dtype)
    dense = Checkpoint.open(str(base)).load(getattr(torch, dtype))
    write_checkpoint(layered_cut(dense, plan), tmp_path / "run", beside=Checkpoint.open(str(base)), card="")
    assert main(arguments(base, plan, tmp_path)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"pruned model: {tmp_path / 'out'}"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in (tmp_path / "run").iterdir()}
    for file in (tmp_path / "run").iterdir():
        if file.name != "README.md":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    loaded = lightning_prune.load(tmp_path / "out")
    assert torch.equal(loaded(tiny_tokens()).logits, cut(dense, plan)(tiny_tokens()).logits)


@pytest.mark.parametrize("name", ["x" * 300, "file", "file/below", "loop", "loop/below", "a\0b"])
def test_output_that_cannot_be_written_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    mixed_plan(make_tiny()).save(tmp_path / "plan.json")
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    arguments = ["--plan", str(tmp_path / "plan.json"), "--model", "demo", "--output", str(tmp_path / name)]
    assert command(["apply", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: --output: ")


@pytest.mark.parametrize("kind", ["pipe", "folder", "missing"])
def test_plan_that_is_no_file_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    plan = tmp_path / "plan.json"
    if kind == "pipe":
        os.mkfifo(plan)
    elif kind == "folder":
        plan.mkdir()
    assert command(["apply", "--plan", str(plan), "--model", "demo", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: --plan: ")
