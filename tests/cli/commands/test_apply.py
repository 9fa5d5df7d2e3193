from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lightning_prune
from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.cli import main
from lightning_prune.models.checkpoint import Checkpoint
from tests.cutting import cut, layered_cut
from tests.tiny import make_tiny, mixed_plan, tiny_tokenizer, tiny_tokens, uniform_plan


def apply(folder: Path, model: str, output: Path) -> int:
    return main(["apply", "--plan", str(folder / "plan.json"), "--model", model, "--output", str(output)])


@pytest.mark.parametrize(
    ("dtype", "make_plan"), [("float32", uniform_plan), ("bfloat16", mixed_plan), ("float16", uniform_plan)]
)
def test_checkpoint_is_byte_identical_to_the_one_the_run_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str, make_plan: Callable
) -> None:
    base, output = str(tmp_path / "base"), tmp_path / "out"
    make_tiny().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    plan = make_plan(make_tiny(), dtype=dtype)
    plan.save(tmp_path / "plan.json")
    opened = Checkpoint.open(base)
    dense = opened.load(getattr(torch, dtype))
    write_checkpoint(layered_cut(dense, plan), tmp_path / "run", beside=opened, card="")
    assert apply(tmp_path, base, output) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"pruned model: {output}"
    written, expected = ({file.name: file.read_bytes() for file in one.iterdir()} for one in (output, tmp_path / "run"))
    assert written | {"README.md": b""} == expected | {"README.md": b""}
    loaded = lightning_prune.load(output)
    assert torch.equal(loaded(tiny_tokens()).logits, cut(dense, plan)(tiny_tokens()).logits)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "complex64", "Tensor", ""])  # of torch: floats, numbers, names
def test_dtype_that_no_checkpoint_is_written_in(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    make_tiny().save_pretrained(tmp_path / "base")
    mixed_plan(make_tiny(), dtype=dtype).save(tmp_path / "plan.json")
    assert apply(tmp_path, str(tmp_path / "base"), tmp_path / "out") == 2
    message = f"error: --plan: found dtype '{dtype}', in which no checkpoint is written. "
    assert capsys.readouterr().err.endswith(message + "Allowed: float64, float32, float16, bfloat16.\n")
    assert not (tmp_path / "out").exists()


def test_the_working_folder_is_a_place_to_write_where_it_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny().save_pretrained(tmp_path / "base")
    plan = mixed_plan(make_tiny())
    plan.save(tmp_path / "plan.json")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert apply(tmp_path, "../base", Path()) == 0
    assert (tmp_path / "here" / "model.safetensors").is_file()
    for empty in ("", " "):
        with pytest.raises(lightning_prune.UserError, match="--output is empty"):
            lightning_prune.apply(plan, tmp_path / "base", empty)
