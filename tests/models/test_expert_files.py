"""Experts between weight files, which hold matrices, and the model, which holds three-dimensional parameters."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.expert_files import stored_parts
from lightning_prune.models.families import family_of
from lightning_prune.support.errors import UserError
from tests.tiny import make_moe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_moe().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_parameters_are_read_as_transformers_reads_them_and_written_as_it_writes_them(folder: Path) -> None:
    stored, checkpoint = load_file(folder / "model.safetensors"), Checkpoint.open(str(folder))
    assert any(".experts.7.up_proj." in name for name in stored)
    model, source = checkpoint.load(None), checkpoint.source()
    written = {}
    for name, parameter in model.named_parameters():
        read = source.read([name], None, torch.device("cpu"))[name]
        assert torch.equal(read, parameter), name
        written |= dict(stored_parts(name, read, family_of(checkpoint.config).experts))
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)


@pytest.mark.parametrize("damage", ["lost", "narrow"])
def test_experts_that_are_not_whole_are_refused(folder: Path, damage: str) -> None:
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    matrix = stored.pop(name)
    if damage == "narrow":
        stored[name] = matrix[1:].contiguous()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"experts of 'model\.layers\.1\.mlp\.experts' are not 8 matrices"):
        Checkpoint.open(str(folder))
