"""Experts between weight files, which hold matrices, and the model, which holds three-dimensional parameters."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.expert_files import stored_parts
from lightning_prune.models.families import family_of
from lightning_prune.models.layered import open_layered
from lightning_prune.support.errors import UserError
from tests.tiny import EXPERTS, make_moe

QWEN = ("experts.7.gate_proj.weight", "experts.7.up_proj.weight", "experts.7.down_proj.weight", "gate.weight")
SHARED = (
    *(*QWEN, "shared_expert_gate.weight"),
    *(f"shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")),
)
GLM = (
    *(*QWEN, "gate.e_score_correction_bias"),
    *(f"shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
)
GRANITE = ("input_linear.weight", "output_linear.weight", "router.layer.weight")
# Of every family, below a layer of a published checkpoint: all names of a block of experts, of the last expert alone.
PUBLISHED: dict[str, tuple[str, tuple[str, ...]]] = {
    "gemma4_text": (
        "",
        (
            *("experts.gate_up_proj", "experts.down_proj", "router.proj.weight", "router.scale"),
            "router.per_expert_scale",
        ),
    ),
    "qwen3_moe": ("mlp", QWEN),
    "deepseek_v3": ("mlp", GLM),
    "qwen3_5_moe_text": ("mlp", SHARED),
    "qwen3_next": ("mlp", SHARED),
    "lfm2_moe": (
        "feed_forward",
        ("gate.weight", "expert_bias", *(f"experts.7.w{number}.weight" for number in (1, 2, 3))),
    ),
    "jamba": ("feed_forward", tuple(name.replace("gate.w", "router.w") for name in QWEN)),
    "nemotron_h": ("mixer", tuple(name for name in GLM if "gate_proj" not in name)),
    "granitemoehybrid": ("block_sparse_moe", GRANITE),
    "olmoe": ("mlp", QWEN),
    "mixtral": ("block_sparse_moe", ("gate.weight", *(f"experts.7.w{number}.weight" for number in (1, 2, 3)))),
    "qwen2_moe": ("mlp", SHARED),
    "granitemoe": ("block_sparse_moe", GRANITE),
    "glm4_moe": ("mlp", GLM),
    "ernie4_5_moe": (
        "mlp",
        (
            *(*QWEN, "moe_statics.e_score_correction_bias"),
            *(f"shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
        ),
    ),
    "gpt_oss": (
        "mlp",
        (
            *("experts.gate_up_proj", "experts.gate_up_proj_bias", "experts.down_proj", "experts.down_proj_bias"),
            *("router.weight", "router.bias"),
        ),
    ),
}


def saved(tmp_path: Path, family: str) -> Path:
    make_moe(family).save_pretrained(tmp_path / family)
    return tmp_path / family


@pytest.mark.parametrize("family", EXPERTS)
def test_parameters_are_read_as_transformers_reads_them_and_written_as_it_writes_them(
    tmp_path: Path, family: str
) -> None:
    folder = saved(tmp_path, family)
    stored, checkpoint = load_file(folder / "model.safetensors"), Checkpoint.open(str(folder))
    block, names = PUBLISHED[family]
    inside = f".layers.3.{block}." if block else ".layers.3."
    last = [name.partition(inside)[2] for name in stored]
    last = last if block else [name for name in last if name.startswith(("experts.", "router."))]
    assert {name for name in last if name and not re.match(r"experts\.[0-6]\.", name)} == set(names)
    model, source = checkpoint.load(None).state_dict(), checkpoint.source()
    written, own = {}, family_of(checkpoint.config)
    for name, _ in checkpoint.meta.named_parameters():
        read = source.read([name], None, torch.device("cpu"))[name]
        assert torch.equal(read, model[name]), name
        for part, values in stored_parts(name, read, own.experts):
            began = next((old for old, new in own.renamed.items() if part.startswith(new)), "")
            written[began + part.removeprefix(own.renamed.get(began, ""))] = values
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
