import dataclasses
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
from lightning_prune.support.errors import UserError
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights_updated": True, "method": "slimgpt"}, "--plan: the method 'slimgpt' also changed the weights"),
        ({"parameters": {"dense": 5, "pruned": 4}}, r"--model: .* has 31,008 parameters.* with 5 "),
        ({"dtype": "int8"}, "--plan: dtype 'int8' is not known"),
        ({"dtype": "nonsense"}, "--plan: dtype 'nonsense' is not known"),
        ({"layers": []}, "--plan: the plan lists 0 layers"),
    ],
)
def test_plan_that_cannot_be_applied_is_refused(
    base: Path, plan: PruningPlan, tmp_path: Path, fields: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments(base, dataclasses.replace(plan, **fields), tmp_path))
    assert not (tmp_path / "out").exists()


def test_output_that_holds_something_is_refused_and_kept(base: Path, plan: PruningPlan, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert main(arguments(base, plan, tmp_path)) == 0  # empty is fine
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=r"--output: .* exists and is not an empty folder"):
        main(arguments(base, plan, tmp_path))
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UserError, match="--output"):
        main(arguments(base, plan, tmp_path, output=base / "config.json"))


def test_model_that_is_not_there_is_refused(plan: PruningPlan, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model"):
        main(arguments(tmp_path / "nowhere", plan, tmp_path))


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--plan", "--model", "--output", "example: lightning-prune apply"))


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
