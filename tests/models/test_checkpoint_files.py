"""Headers are believed only as far as the file goes, and nothing the weights hold is lost or made up."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_prune.models.checkpoint_files import open_checkpoint
from lightning_prune.models.loading import load_config, load_model, meta_model
from lightning_prune.models.safetensors_header import read_header
from lightning_prune.support.errors import UserError
from tests.cutting import cut
from tests.tiny import EVERY_FAMILY, make_tiny, mixed_plan, uniform_plan

Edit = Callable[[dict[str, torch.Tensor]], None]


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def rewritten(folder: Path, edit: Edit) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def check(folder: Path) -> dict[str, str]:
    files = open_checkpoint(str(folder))
    return files.check_against(meta_model(load_config(str(folder))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bytes_at_the_offsets_are_the_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    make_tiny().to(dtype).save_pretrained(tmp_path)
    files = open_checkpoint(str(tmp_path))
    expected = load_file(tmp_path / "model.safetensors")
    assert files.tensors.keys() == expected.keys()
    for name, entry in files.tensors.items():
        raw = bytearray(entry.file.read_bytes()[entry.start : entry.end])
        assert torch.equal(torch.frombuffer(raw, dtype=entry.dtype).reshape(entry.shape), expected[name])
    assert files.total_bytes == sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    assert files.num_layers == 4
    assert files.config_path == tmp_path / "config.json"


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    model = make_tiny()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    files = open_checkpoint(str(tmp_path))
    for name, parameter in model.named_parameters():
        entry = files.tensors[name]
        raw = bytearray(entry.file.read_bytes()[entry.start : entry.end])
        assert torch.equal(torch.frombuffer(raw, dtype=entry.dtype).reshape(entry.shape), parameter)
    assert check(tmp_path)["lm_head.weight"] == "model.embed_tokens.weight"


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_of_a_dense_model_is_found(tmp_path: Path, family: str, tied: bool) -> None:
    model = make_tiny(family, tied=tied)
    model.save_pretrained(tmp_path)
    stored = check(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(tensors[stored[name]], parameter)


@pytest.mark.parametrize("plan", [mixed_plan, uniform_plan])
def test_pruned_checkpoints_fit_their_configs(tmp_path: Path, plan: Callable[..., Any]) -> None:
    model = make_tiny()
    cut(model, plan(model)).save_pretrained(tmp_path)
    assert check(tmp_path)


def prefix(tensors: dict[str, torch.Tensor], rename: Callable[[str], str]) -> None:
    for name in list(tensors):
        tensors[rename(name)] = tensors.pop(name)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
        lambda t: prefix(t, lambda name: name.removeprefix("model.")),
        lambda t: prefix(t, lambda name: "model." + name),
    ],
    ids=["rotary table", "copy of a tied head", "tied head alone", "base model names", "doubled prefix"],
)
def test_harmless_differences_load_as_transformers_loads_them(tiny_checkpoint: Callable[..., Path], edit: Edit) -> None:
    folder = rewritten(tiny_checkpoint(), edit)
    stored = check(folder)
    tensors = load_file(folder / "model.safetensors")
    loaded = dict(load_model(str(folder), None).named_parameters(remove_duplicate=False))
    original = dict(make_tiny().named_parameters(remove_duplicate=False))
    assert stored.keys() == loaded.keys()
    for name, parameter in loaded.items():
        assert torch.equal(parameter, original[name])
        assert torch.equal(parameter, tensors[stored[name]])


BIAS = "model.layers.1.self_attn.o_proj.bias"
MISFITS: dict[str, tuple[Edit, str]] = {
    "bias": (lambda t: t.update({BIAS: torch.ones(32)}), rf"1 tensors .* not part of the model.*{BIAS}"),
    "layer beyond the last": (
        lambda t: t.update({"model.layers.4.mlp.up_proj.weight": torch.ones(40, 32)}),
        "num_hidden_layers 4, but its weights have 5 layers",
    ),
    "unknown name": (lambda t: t.update({"visual.weight": torch.ones(2)}), r"not part of the model.*visual\.weight"),
    "missing": (lambda t: t.pop("model.norm.weight"), r"lack 1 tensors .*model\.norm\.weight"),
    "no embedding": (lambda t: t.pop("model.embed_tokens.weight"), r"lack 2 tensors .*model\.embed_tokens\.weight"),
    "shape": (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"model\.norm\.weight.*\[31\].*\[32\]"),
    "transposed": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(32, 40)}),
        r"up_proj.*\[32, 40\].*\[40, 32\]",
    ),
    "integers": (
        lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        r"model\.norm\.weight.*int8.*bfloat16.*quantised",
    ),
    "eight bits": (
        lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}),
        r"model\.norm\.weight.*float8_e4m3fn.*quantised",
    ),
    "twice": (lambda t: t.update({"norm.weight": torch.ones(32)}), r"'model\.norm\.weight' twice"),
    "head that differs": (
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
        r"ties .* both are stored and differ.*tie_word_embeddings",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_that_do_not_fit_the_config(tiny_checkpoint: Callable[..., Path], misfit: str) -> None:
    edit, message = MISFITS[misfit]
    folder = rewritten(tiny_checkpoint(), edit)
    with pytest.raises(UserError, match=rf"^--model\.pretrained: .*{message}"):
        load_model(str(folder), None)


def test_config_with_fewer_layers_than_the_weights(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    for claimed in (3, 100_000):  # the second would take minutes to build
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": claimed}))
        with pytest.raises(UserError, match=f"num_hidden_layers {claimed}, but its weights have 4 layers"):
            load_model(str(folder), None)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{", b"", "damaged"),
    "not UTF-8": (b'{"\xff": 1}', b"", "damaged"),
    "deep": (b"[" * 200_000, b"", "damaged"),
    "list": ([], b"", "not a JSON object"),
    "entry is no object": ({"a": 3}, b"", "not described by"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), "not described by"),
    "unknown dtype": ({"a": F32 | {"dtype": "F33"}}, bytes(8), "unknown dtype 'F33'"),
    "dtype is a list": ({"a": F32 | {"dtype": ["F32"]}}, bytes(8), "unknown dtype"),
    "negative size": ({"a": F32 | {"shape": [-2]}}, bytes(8), "not lists of sizes"),
    "true as size": ({"a": F32 | {"shape": [True, 2]}}, bytes(8), "not lists of sizes"),
    "one offset": ({"a": F32 | {"data_offsets": [0]}}, bytes(8), "not lists of sizes"),
    "huge shape": ({"a": F32 | {"shape": [2**62, 2**62]}}, bytes(8), "does not fit"),
    "shape and offsets": ({"a": F32 | {"shape": [3]}}, bytes(8), "does not fit"),
    "beyond the end": ({"a": F32}, bytes(4), "does not fit"),
    "bytes left over": ({"a": F32}, bytes(12), "end at byte"),
    "gap": ({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, bytes(20), "begins at byte"),
    "overlap": ({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12), "begins at byte"),
    "twice": (b'{"a": %b, "a": %b}' % ((json.dumps(F32).encode(),) * 2), bytes(8), "'a' stands there twice"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_header(tmp_path: Path, damage: str) -> None:
    header, data, message = DAMAGED[damage]
    with pytest.raises(UserError, match=rf"^--model\.pretrained: .*{message}"):
        read_header(raw_file(tmp_path / "model.safetensors", header, data))


@pytest.mark.parametrize("length", [2**63, 10**9, 1000])
def test_length_that_the_header_claims_is_not_allocated(tmp_path: Path, length: int) -> None:
    with pytest.raises(UserError, match=rf"claims {length} bytes, the file has"):
        read_header(raw_file(tmp_path / "model.safetensors", {}, length=length))


@pytest.mark.parametrize("content", [b"", b"\x00" * 7])
def test_file_that_is_too_short(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="too short"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.timeout(20)
def test_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="named pipe"):
        read_header(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="folder"):
        read_header(tmp_path)
    with pytest.raises(UserError, match="device"):
        read_header(Path("/dev/zero"))


NAME = "model.norm.weight"
BAD_INDEX: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "list": (lambda index: [], "no weight_map"),
    "no map": (lambda index: {}, "no weight_map"),
    "empty map": (lambda index: {"weight_map": {}}, "no weight_map"),
    "number": (lambda index: {"weight_map": index["weight_map"] | {NAME: 3}}, "not the name of a safetensors file"),
    "outside": (lambda index: {"weight_map": index["weight_map"] | {NAME: "../x.safetensors"}}, "not the name"),
    "pickle": (lambda index: {"weight_map": index["weight_map"] | {NAME: "x.bin"}}, "not the name"),
    "shard not there": (lambda index: {"weight_map": index["weight_map"] | {"a": "x.safetensors"}}, "is not there"),
    "tensor not there": (
        lambda index: {"weight_map": index["weight_map"] | {"a": index["weight_map"][NAME]}},
        "names tensor 'a'",
    ),
    "other shard": (
        lambda index: {"weight_map": index["weight_map"] | {NAME: index["weight_map"]["model.embed_tokens.weight"]}},
        "is in .* and also in",
    ),
}


@pytest.mark.parametrize("damage", BAD_INDEX)
def test_index_that_does_not_fit_its_files(tmp_path: Path, damage: str) -> None:
    make_tiny().save_pretrained(tmp_path, max_shard_size="20KB")
    edit, message = BAD_INDEX[damage]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(edit(json.loads(index.read_text()))))
    with pytest.raises(UserError, match=rf"^--model\.pretrained: the weights cannot be loaded.*{message}"):
        open_checkpoint(str(tmp_path))


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    make_tiny().save_pretrained(tmp_path, max_shard_size="20KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    save_file(load_file(second) | {next(iter(tensors)): next(iter(tensors.values()))}, second)
    with pytest.raises(UserError, match=r"is in .* and also in"):
        open_checkpoint(str(tmp_path))


def test_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_checkpoint(str(tmp_path))


def test_model_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--somebody--tiny"
    make_tiny().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = open_checkpoint("somebody/tiny")
    assert files.num_layers == 4
    assert files.tensors["model.norm.weight"].shape == (32,)
