"""Headers are believed only as far as the file goes, and nothing the weights hold is lost or made up."""

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import open_layered
from lightning_prune.models.weights import read_headers
from lightning_prune.support.errors import UserError
from tests.tiny import make_tiny, tiny_tokens

Edit = Callable[[dict[str, torch.Tensor]], object]
HEAD = "lm_head.weight"


def rewritten(folder: Path, edit: Edit) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_headers_and_source_say_what_is_stored(tmp_path: Path, dtype: torch.dtype, shard_size: str) -> None:
    model = make_tiny().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    checkpoint = Checkpoint.open(str(tmp_path))
    expected = dict(model.named_parameters())
    assert checkpoint.weight_files == sorted(tmp_path.glob("*.safetensors"))
    assert {name: (e.dtype, e.shape) for name, e in checkpoint.tensors.items()} == {
        name: (dtype, tuple(parameter.shape)) for name, parameter in expected.items()
    }
    assert checkpoint.stored_dtype == dtype
    assert checkpoint.stored_names["lm_head.weight"] == "model.embed_tokens.weight"
    read = checkpoint.source().read(list(expected), None, torch.device("cpu"))
    assert all(torch.equal(read[name], parameter) for name, parameter in expected.items())


def prefix(tensors: dict[str, torch.Tensor], rename: Callable[[str], str]) -> None:
    for name in list(tensors):
        tensors[rename(name)] = tensors.pop(name)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        lambda t: t.update({name: t["model.embed_tokens.weight"].clone() for name in (HEAD, f"model.{HEAD}")}),
        lambda t: t.update({HEAD: t.pop("model.embed_tokens.weight")}),
        lambda t: prefix(t, lambda name: name.removeprefix("model.")),
        lambda t: prefix(t, lambda name: "model." + name),
    ],
    ids=["rotary table", "equal copies of a tied head", "tied head alone", "base model names", "doubled prefix"],
)
def test_harmless_differences_load_as_transformers_loads_them(tiny_checkpoint: Callable[..., Path], edit: Edit) -> None:
    folder = rewritten(tiny_checkpoint(), edit)
    checkpoint = Checkpoint.open(str(folder))
    tensors = load_file(folder / "model.safetensors")
    loaded = dict(checkpoint.load(None).named_parameters(remove_duplicate=False))
    original = dict(make_tiny().named_parameters(remove_duplicate=False))
    assert checkpoint.stored_names.keys() == loaded.keys()
    for name, parameter in loaded.items():
        assert torch.equal(parameter, original[name])
        assert torch.equal(parameter, tensors[checkpoint.stored_names[name]])


BIAS = "model.layers.1.self_attn.o_proj.bias"
NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
MISFITS: dict[str, tuple[Edit, str]] = {
    "bias": (lambda t: t.update({BIAS: torch.ones(32)}), rf"1 tensors .* not part of the model.*{BIAS}"),
    "quantised by name": (lambda t: t.update({f"{UP}_scale_inv": torch.ones(1)}), rf"quantised.*{UP}_scale_inv"),
    "unknown name": (lambda t: t.update({"sound.weight": torch.ones(2)}), r"not part of the model.*sound\.weight"),
    "missing": (lambda t: t.pop(NORM), rf"lack 1 tensors .*{NORM}"),
    "no embedding": (lambda t: t.pop("model.embed_tokens.weight"), r"lack 2 tensors .*model\.embed_tokens\.weight"),
    "shape": (lambda t: t.update({NORM: torch.ones(31)}), rf"{NORM}.*\[31\].*\[32\]"),
    "transposed": (lambda t: t.update({UP: torch.ones(32, 40)}), rf"{UP}.*\[32, 40\].*\[40, 32\]"),
    "integers": (lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}), rf"{NORM}.*I8.*BF16.*quantised"),
    "eight bits": (lambda t: t.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)}), rf"{NORM}.*F8_E4M3.*quantised"),
    "twice": (lambda t: t.update({"norm.weight": torch.ones(32)}), rf"'{NORM}' twice"),
    "head that differs": (
        lambda t: t.update({HEAD: t["model.embed_tokens.weight"] + 1}),
        r"ties .* both are stored and differ.*tie_word_embeddings",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_that_do_not_fit_the_config(tiny_checkpoint: Callable[..., Path], misfit: str) -> None:
    edit, message = MISFITS[misfit]
    folder = rewritten(tiny_checkpoint(), edit)
    with pytest.raises(UserError, match=rf"^--model\.pretrained: .*{message}"):
        Checkpoint.open(str(folder)).check()


SIDE_PARTS: dict[str, tuple[str, str]] = {
    "multi-token prediction": ("mtp.layers.0.eh_proj.weight", "mtp"),
    "of MiMo": ("model.mtp_layers.0.hidden_layernorm.weight", "mtp_layers"),
    "value head": ("v_head.summary.weight", "v_head"),
    "layer beyond the last": ("model.layers.4.mlp.up_proj.weight", "layers.4"),
    "far beyond": ("model.layers.61.eh_proj.weight", "layers.61"),
    "vision tower": ("model.vision_tower.layers.40.norm.weight", "vision_tower"),
    "published Qwen-VL": ("visual.blocks.0.norm1.weight", "visual"),
    "rotary table": ("model.layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb"),
}


@pytest.mark.parametrize("name", SIDE_PARTS)
def test_known_side_parts_are_left_out_and_named(tiny_checkpoint: Callable[..., Path], name: str) -> None:
    tensor, part = SIDE_PARTS[name]
    eight = torch.ones(3, 3).to(torch.float8_e4m3fn)  # a part that is not read may be stored in any way
    folder = rewritten(tiny_checkpoint(), lambda t: t.update({tensor: eight}))
    checkpoint = Checkpoint.open(str(folder))
    with pytest.warns(UserWarning, match=rf"left out: {re.escape(part)} \(1\)"):
        checkpoint.check()
    assert torch.equal(checkpoint.load(None)(tiny_tokens()).logits, make_tiny()(tiny_tokens()).logits)


def test_names_of_published_files_are_read_and_written(tmp_path: Path) -> None:
    """GPT-NeoX calls its head otherwise than transformers does, and older files hold its causal masks."""
    model = make_tiny("gpt_neox", tied=False)
    model.save_pretrained(tmp_path / "published")
    names = set(load_file(tmp_path / "published" / "model.safetensors"))
    assert "embed_out.weight" in names
    assert "lm_head.weight" not in names
    mask = "gpt_neox.layers.{}.attention.{}"
    rewritten(tmp_path / "published", lambda t: t.update({mask.format(0, "bias"): torch.ones(4, 4, dtype=torch.bool)}))
    rewritten(tmp_path / "published", lambda t: t.update({mask.format(1, "masked_bias"): torch.tensor(-1e9)}))
    opened = Checkpoint.open(str(tmp_path / "published"))
    assert len(opened.notes()) == 1
    layers = open_layered(opened, None, torch.device("cpu"))
    write_checkpoint(layers, tmp_path / "written", beside=None, card="")
    assert set(load_file(tmp_path / "written" / "model.safetensors")) == names
    expected, again = model(tiny_tokens()).logits, Checkpoint.open(str(tmp_path / "written"))
    assert all(torch.equal(one.load(None)(tiny_tokens()).logits, expected) for one in (opened, again))


DAMAGED: dict[str, tuple[bytes, int | None]] = {  # header, and its length where another one is written
    "not JSON": (b"{", None),
    "deep": (b"[" * 200_000, None),
    "unknown dtype": (b'{"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}', None),
    "beyond the end": (b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', None),
    "length beyond memory": (b"{}", 2**63),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_header(tmp_path: Path, damage: str) -> None:
    header, length = DAMAGED[damage]
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length or len(header)) + header + bytes(8))
    with pytest.raises(UserError, match=r"^--model\.pretrained: .*is damaged"):
        read_headers(str(tmp_path), 4)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_pipe_is_not_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        read_headers(str(tmp_path), 4)


WeightMap = dict[str, Any]
BAD_INDEX: dict[str, tuple[Callable[[WeightMap], Any], str]] = {
    "list": (lambda names: [], "no weight_map"),
    "empty map": (lambda names: {"weight_map": {}}, "no weight_map"),
    "number": (lambda names: {"weight_map": names | {NORM: 3}}, "not the name of a safetensors file"),
    "outside": (lambda names: {"weight_map": names | {NORM: "../x.safetensors"}}, "not the name"),
    "pickle": (lambda names: {"weight_map": names | {NORM: "x.bin"}}, "not the name"),
    "shard not there": (lambda names: {"weight_map": names | {"a": "x.safetensors"}}, "does not exist"),
    "tensor not there": (lambda names: {"weight_map": names | {"a": names[NORM]}}, "names tensor 'a'"),
    "other shard": (lambda names: {"weight_map": names | {NORM: names["model.embed_tokens.weight"]}}, "and also in"),
}


@pytest.mark.parametrize("damage", BAD_INDEX)
def test_index_that_does_not_fit_its_files(tmp_path: Path, damage: str) -> None:
    make_tiny().save_pretrained(tmp_path, max_shard_size="20KB")
    edit, message = BAD_INDEX[damage]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(edit(json.loads(index.read_text())["weight_map"])))
    with pytest.raises(UserError, match=rf"^--model\.pretrained: the weights cannot be loaded.*{message}"):
        read_headers(str(tmp_path), 4)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    make_tiny().save_pretrained(tmp_path, max_shard_size="20KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    save_file(load_file(second) | {next(iter(tensors)): next(iter(tensors.values()))}, second)
    with pytest.raises(UserError, match=r"is in .* and also in"):
        read_headers(str(tmp_path), 4)
