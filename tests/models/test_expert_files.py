"""Experts between weight files, which hold matrices, and the model, which holds three-dimensional parameters."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.expert_files import stored_parts
from lightning_prune.models.families import family_of
from lightning_prune.models.layered import open_layered
from lightning_prune.models.weights import renamed
from lightning_prune.support.errors import UserError
from tests.tiny import EXPERTS, make_moe


def saved(tmp_path: Path, family: str) -> Path:
    make_moe(family).save_pretrained(tmp_path / family)
    return tmp_path / family


@pytest.mark.parametrize("family", EXPERTS)
def test_parameters_are_read_as_transformers_reads_them_and_written_as_it_writes_them(
    tmp_path: Path, family: str
) -> None:
    folder = saved(tmp_path, family)
    stored, checkpoint = load_file(folder / "model.safetensors"), Checkpoint.open(str(folder))
    own = family_of(checkpoint.config)
    matrices = [f".experts.7.{matrix}.weight" for matrix in own.experts.stored or ()]
    assert all(any(part in name for name in stored) for part in (*own.renamed, *matrices))  # the names of the hub
    model, source = checkpoint.load(None).state_dict(), checkpoint.source()
    written, published = {}, {new: old for old, new in own.renamed.items()}
    for name, _ in checkpoint.meta.named_parameters():
        read = source.read([name], None, torch.device("cpu"))[name]
        assert torch.equal(read, model[name]), name
        written |= {renamed(part, published): values for part, values in stored_parts(name, read, own.experts)}
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)


@pytest.mark.parametrize("damage", ["lost", "narrow"])
def test_experts_that_are_not_whole_are_refused(tmp_path: Path, damage: str) -> None:
    folder = saved(tmp_path, "qwen3_moe")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    matrix = stored.pop(name)
    if damage == "narrow":
        stored[name] = matrix[1:].contiguous()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"experts of 'model\.layers\.1\.mlp\.experts' are not 8 matrices"):
        Checkpoint.open(str(folder))


def test_experts_in_one_tensor_stay_in_one(tmp_path: Path) -> None:
    """As the published Qwen3.5 has them, where transformers saves a new model in matrices."""
    model = make_moe("qwen3_5_moe_text")
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert "model.layers.3.mlp.experts.gate_up_proj" in names
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    write_checkpoint(open_layered(checkpoint, None, torch.device("cpu")), tmp_path / "out", beside=checkpoint, card="")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == names
