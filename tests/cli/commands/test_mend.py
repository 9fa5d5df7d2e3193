"""Old checkpoints get the modeling file of this version, and nothing else is touched."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lightning_prune
from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.cli import main
from lightning_prune.models import modeling_pruned
from tests.cutting import layered_cut
from tests.tiny import FAMILIES, make_tiny, mixed_plan, tiny_tokens, uniform_plan

SOURCE = Path(modeling_pruned.__file__).read_text(encoding="utf-8")
FINDS_THE_CACHE = "next((x for x in inputs if _is_kv_cache(x)), None)"
# What the first versions' file amounts to on transformers 5.24, which renamed the keyword that they looked for.
BROKEN = SOURCE.replace(FINDS_THE_CACHE, "None")


def new_checkpoint(folder: Path, family: str = "llama", plan: Any = mixed_plan) -> Path:
    model = make_tiny(family)
    write_checkpoint(layered_cut(model, plan(model)), folder, beside=None, card="")
    return folder


def make_old(folder: Path) -> Path:
    """``folder`` as the first versions wrote it: another modeling file, ``auto_map`` and ``architectures``."""
    config = json.loads((folder / "config.json").read_text())
    name = config["auto_map"]["AutoModelForCausalLM"].partition(".")[2]
    config |= {"architectures": [name], "auto_map": {"AutoModelForCausalLM": f"modeling_pruned.{name}"}}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "modeling_pruned.py").write_text(BROKEN)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@torch.no_grad()
def decoded(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens of a left-padded batch, with a cache and without."""
    tokens = tiny_tokens(batch=2, length=8)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    common = {"attention_mask": mask, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    return model.generate(tokens, **common), model.generate(tokens, use_cache=False, **common)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_old_checkpoint_becomes_the_one_that_is_written_today(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = new_checkpoint(tmp_path / "pruned", family)
    today = contents(folder)
    make_old(folder)
    assert main(["mend", "--model", str(folder)]) == 0
    assert contents(folder) == today
    assert capsys.readouterr().out.splitlines()[-1] == f"{folder}: replaced modeling_pruned.py and config.json"
    assert main(["mend", "--model", str(folder)]) == 0
    assert contents(folder) == today
    assert capsys.readouterr().out.splitlines()[-1] == f"{folder}: nothing to mend"


def test_decoding_is_wrong_before_and_right_after_and_always_right_in_this_package(tmp_path: Path) -> None:
    assert FINDS_THE_CACHE in SOURCE
    folder = make_old(new_checkpoint(tmp_path / "pruned"))
    cached, expected = decoded(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))
    assert not torch.equal(cached, expected)
    assert torch.equal(decoded(lightning_prune.load(folder))[0], expected)
    assert main(["mend", "--model", str(folder)]) == 0
    cached, again = decoded(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))
    assert torch.equal(again, expected)
    assert torch.equal(cached, expected)


def test_a_lost_modeling_file_comes_back(tmp_path: Path) -> None:
    folder = new_checkpoint(tmp_path / "pruned")
    today = contents(folder)
    (folder / "modeling_pruned.py").unlink()
    assert main(["mend", "--model", str(folder)]) == 0
    assert contents(folder) == today


FOREIGN = "no checkpoint that lightning-prune wrote"


def stock(folder: Path) -> None:
    new_checkpoint(folder, plan=uniform_plan)


def dense(folder: Path) -> None:
    make_tiny().save_pretrained(folder)


def changed(**values: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = make_old(new_checkpoint(folder)) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return make


def foreign_code(folder: Path) -> None:
    (new_checkpoint(folder) / "modeling_pruned.py").write_text("class Mine: ...\n")


def no_json(folder: Path) -> None:
    (new_checkpoint(folder) / "config.json").write_bytes(b"\xff{")


def a_list(folder: Path) -> None:
    (new_checkpoint(folder) / "config.json").write_text("[1]")


def run_folder(folder: Path) -> None:
    new_checkpoint(folder / "pruned")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (stock, "are all stock"),
        (dense, "are all stock"),
        (a_list, "are all stock"),
        (
            changed(auto_map={"AutoModelForCausalLM": "modeling_other.Other"}),
            FOREIGN,
        ),
        (changed(auto_map={"AutoModelForCausalLM": 3}), FOREIGN),
        (changed(auto_map=[]), FOREIGN),
        (changed(architectures=None), FOREIGN),
        (changed(architectures=["GPT2LMHeadModel"]), FOREIGN),
        (changed(model_type="gpt2"), FOREIGN),
        (changed(model_type=["llama"]), FOREIGN),
        (foreign_code, FOREIGN),
        (no_json, "cannot be read as JSON"),
        (lambda folder: folder.mkdir(), "holds no config.json"),
        (lambda folder: None, "holds no config.json"),
        (run_folder, "Did you mean"),
    ],
)
def test_what_is_not_ours_is_refused_and_kept(
    make: Callable[[Path], None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    make(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()  # progress bars
    assert main(["mend", "--model", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --model: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_full_disk_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_old(new_checkpoint(tmp_path / "pruned"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lightning_prune.support.files.write_text", full)
    assert main(["mend", "--model", str(folder)]) == 2
    assert "No space left on device" in capsys.readouterr().err
