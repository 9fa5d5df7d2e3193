"""Model folders that lie, are damaged, or are no models: refused before a weight is read, or pruned as they are."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hostile.harness import Bench, Case, unreadable

USE = "--model.pretrained INPUTS/model"
NUMBERS: list[Any] = [0, -1, 1.5, "x", "4", [], {}, True, 10**30, 1e308]
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
)

CONFIGS: dict[str, Case] = {}  # one key of config.json replaced
WEIGHTS: dict[str, Case] = {}  # files of the folder damaged


def config(status: int | tuple[int, ...] = 2, says: str | tuple[str, ...] = "--model.pretrained", **keys: Any) -> None:
    """One case: the tiny model with ``keys`` in its config.json."""
    name = ", ".join(f"{key}={value!r:.40}" for key, value in keys.items())
    CONFIGS[name] = Case(USE, status, says, lambda folder: edit_config(folder / "model", keys))


def weights(name: str, change: Callable[[Path], object], says: str | tuple[str, ...] = (), status: int = 2) -> None:
    """One case: the tiny model's folder after ``change``."""
    WEIGHTS[name] = Case(USE, status, says, lambda folder: change(folder / "model"))


def edit_config(model: Path, keys: dict[str, Any]) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def run(model: Path) -> None:
        file = model / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return run


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def run(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        make(model / name)

    return run


def text(content: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def bind(path: Path) -> None:
    os.chdir(path.parent)  # a socket's whole path may have only 108 characters
    socket.socket(socket.AF_UNIX).bind(path.name)


for key in SIZES:
    for value in NUMBERS:
        config(**{key: value})
    config(status=2 if key != "num_key_value_heads" else (0, 2), **{key: None})
for value in NUMBERS:
    config(status=(0, 2) if value == 0 else 2, head_dim=value)  # 0 and null: hidden_size / heads
config(num_hidden_layers=100_000, says="weights have 4 layers")
config(num_hidden_layers=3, says="weights have 4 layers")
config(num_hidden_layers=5, says="weights have 4 layers")
config(num_attention_heads=3)
config(num_attention_heads=8, says="shape")
config(num_key_value_heads=3)
config(num_key_value_heads=4, says="shape")
config(intermediate_size=39, says=("shape", "[32, 40]", "[32, 39]"))
config(hidden_size=64)
config(vocab_size=95, says="[95, 32]")
config(vocab_size=97, says="[96, 32]")
config(head_dim=16, says="shape")
config(model_type="gpt2", says="'gpt2' is not supported")
config(model_type="nothing")
config(model_type=None)
config(model_type=3)
config(model_type=[])
config(model_type="mistral", status=(0, 2))
config(model_type="qwen2", says="lack 12 tensors")
config(attention_bias=True, says="lack 16 tensors")
config(mlp_bias=True, says="lack 12 tensors")
config(tie_word_embeddings=False, says="'lm_head.weight'")
config(tie_word_embeddings="x", status=(0, 2))
config(hidden_act="nothing")
config(hidden_act=None)
config(hidden_act=3)
config(rms_norm_eps="x", status=(0, 2))
config(rms_norm_eps=None)
config(rope_parameters={"rope_type": "nothing", "rope_theta": 1e4})
config(rope_parameters={"rope_type": "yarn"})
config(rope_parameters=3)
config(rope_parameters=[])
config(rope_parameters={"rope_type": "default", "rope_theta": 0}, status=(0, 1, 2))
config(rope_parameters={"rope_type": "default", "rope_theta": "x"})
config(max_position_embeddings=0, says="positions")
config(max_position_embeddings=-1, says="positions")
config(max_position_embeddings=8, says="positions")
config(max_position_embeddings="x")
config(max_position_embeddings=None, status=(0, 2))
config(max_position_embeddings=10**30, status=(0, 2))
config(pad_token_id=1000, status=(0, 2))
config(pad_token_id=-5, status=(0, 2))
config(pad_token_id="x", status=(0, 2))
config(dtype="float3")
config(dtype="int8", status=(0, 2))
config(dtype=3, status=(0, 2))
config(torch_dtype="nothing", status=(0, 2))
config(architectures=["BertModel"], status=0)
config(architectures="x", status=(0, 2))
config(auto_map={"AutoModelForCausalLM": "evil.Evil"}, status=(0, 2))
config(quantization_config={"quant_method": "gptq", "bits": 4}, says="quantised")
config(quantization_config={}, says="quantised")
config(quantization_config="x")
config(per_layer_config={"0": {"intermediate_size": 8}})
config(per_layer_config={"99": {"intermediate_size": 8}})
config(per_layer_config={"0": {"skip": ["everything"]}})
config(per_layer_config=3)
config(per_layer_config=[1])
config(layer_types=["full_attention"])
config(layer_types="x")
config(_attn_implementation="nothing", status=(0, 2))
config(attn_implementation="nothing", status=(0, 2))
config(initializer_range="x", status=(0, 2))
config(attention_dropout="x", status=(0, 2))
config(use_cache="x", status=(0, 2))
config(pretraining_tp=4, status=(0, 2))
config(num_labels=-1, status=(0, 2))
config(id2label=3, status=(0, 2))
config(transformers_weights="../model.safetensors", status=(0, 2))

weights("config is a list", replaced("config.json", text("[]")), "--model.pretrained")
weights("config is null", replaced("config.json", text("null")), "--model.pretrained")
weights("config is a number", replaced("config.json", text("3")), "--model.pretrained")
weights("config is empty", replaced("config.json", text("")), "--model.pretrained")
weights("config is half", replaced("config.json", text('{"model_type": "llama"')), "--model.pretrained")
weights("config is an empty object", replaced("config.json", text("{}")), "--model.pretrained")
weights("config is binary", replaced("config.json", text(b"\xff\xfe\x00")), "--model.pretrained")
weights("config is deep", replaced("config.json", text("[" * 100_000)), "--model.pretrained")
weights("config has a huge number", replaced("config.json", text('{"a": ' + "9" * 5000 + "}")), "--model.pretrained")
weights("config is NaN", replaced("config.json", text('{"model_type": "llama", "hidden_size": NaN}')), "--model")
weights("config is a folder", replaced("config.json", Path.mkdir), "no config.json")
weights("config is a pipe", replaced("config.json", os.mkfifo), "named pipe")
weights("config is a socket", replaced("config.json", bind), "socket")
weights("config is a device", replaced("config.json", lambda path: path.symlink_to("/dev/zero")), "device")
weights("config links to itself", replaced("config.json", lambda path: path.symlink_to(path)), "no config.json")
weights("config links nowhere", replaced("config.json", lambda path: path.symlink_to("nowhere")), "no config.json")
weights("config is huge", replaced("config.json", lambda path: sparse(path, 10**11)), "bytes")
weights("weights are gone", replaced("model.safetensors", lambda path: None), "neither model.safetensors")
weights("weights are a pipe", replaced("model.safetensors", os.mkfifo), "--model.pretrained")
weights("weights are a folder", replaced("model.safetensors", Path.mkdir), "--model.pretrained")
weights("weights are a device", replaced("model.safetensors", lambda path: path.symlink_to("/dev/zero")), "--model")
weights("weights are empty", replaced("model.safetensors", text("")), "is damaged")
weights("weights are zeros", replaced("model.safetensors", text(bytes(1000))), "damaged")
weights("weights are text", replaced("model.safetensors", text("x" * 1000)), "is damaged")
weights("weights are sparse", replaced("model.safetensors", lambda path: sparse(path, 10**13)), "damaged")
weights("weights claim much", replaced("model.safetensors", text(b"\xff" * 7 + b"\x7f" + b"{}")), "is damaged")
weights("weights are a pickle", replaced("model.safetensors", lambda path: torch.save({}, path)), "damaged")
weights("weights are cut", lambda m: os.truncate(m / "model.safetensors", 50_000), "damaged")
weights("weights have more", lambda m: (m / "model.safetensors").open("ab").write(b"x"), "damaged")
weights("no tensors", edit_tensors(dict.clear), "weights have 0 layers")
weights("a bias too many", edit_tensors(lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(32)})))
weights("a layer too many", edit_tensors(lambda t: t.update({"model.layers.4.x": torch.ones(32)})), "have 5 layers")
weights("a layer far off", edit_tensors(lambda t: t.update({"model.layers.999999999.x": torch.ones(3)})), "5 layers")
weights("an adapter", edit_tensors(lambda t: t.update({"model.layers.0.lora_A": torch.ones(3)})), "not part of")
weights("a tensor missing", edit_tensors(lambda t: t.pop("model.norm.weight")), "lack 1 tensors")
weights("a shape", edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(32, 1)})), "shape [32, 1]")
weights("a scalar", edit_tensors(lambda t: t.update({"model.norm.weight": torch.tensor(1.0)})), "shape []")
weights("an empty tensor", edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(0)})), "shape [0]")
weights("whole numbers", edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(32).int()})), "I32")
weights("two heads", edit_tensors(lambda t: t.update({"lm_head.weight": torch.ones(96, 32)})), "both are stored")
weights("a rotary table", edit_tensors(lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(4)})), status=0)
weights("index is a list", lambda m: index(m, "[]"), "no weight_map")
weights("index is text", lambda m: index(m, "x"), "damaged")
weights("index is empty", lambda m: index(m, '{"weight_map": {}}'), "no weight_map")
weights("index leads out", lambda m: index(m, '{"weight_map": {"a": "../../x.safetensors"}}'), "not the name")
weights("index leads nowhere", lambda m: index(m, '{"weight_map": {"a": "x.safetensors"}}'), "not there")
weights("index names a pickle", lambda m: index(m, '{"weight_map": {"a": "x.bin"}}'), "not the name")
weights("generation config is text", replaced("generation_config.json", text("x")), "the generation config")
weights("generation config is a list", replaced("generation_config.json", text("[]")), "the generation config")
weights("generation config is null", replaced("generation_config.json", text("null")), "the generation config")
weights("generation config is deep", replaced("generation_config.json", text("[" * 10**5)), "the generation config")
weights("generation config is silly", replaced("generation_config.json", text('{"top_k": "x"}')), status=(0, 2))
weights("generation config is a pipe", replaced("generation_config.json", os.mkfifo), status=0)
weights("an adapter config", lambda m: (m / "adapter_config.json").write_text("{}"), "adapter")
weights("tokenizer is text", lambda m: (m / "tokenizer.json").write_text("x"), status=0)

PLACES = {
    "empty name": Case("--model.pretrained=", says="--model.pretrained"),
    "null": Case("--model.pretrained null", says="needs a value"),
    "file": Case("--model.pretrained INPUTS/f", 2, "--model.pretrained", lambda folder: (folder / "f").write_text("")),
    "empty folder": Case("--model.pretrained INPUTS", says="no config.json"),
    "pipe": Case("--model.pretrained INPUTS/f", 2, "--model.pretrained", lambda folder: os.mkfifo(folder / "f")),
    "device": Case("--model.pretrained /dev/zero", says="--model.pretrained"),
    "root": Case("--model.pretrained /", says="no config.json"),
    "too long": Case(f"--model.pretrained /{'a' * 5000}", says="--model.pretrained"),
    "too long name": Case(f"--model.pretrained {'a' * 300}", says="--model.pretrained"),
    "loop": Case("--model.pretrained INPUTS/l", 2, "--model", lambda folder: (folder / "l").symlink_to(folder / "l")),
    "nobody's home": Case("--model.pretrained ~nobody-here/x", says="home folder"),
    "web address": Case("--model.pretrained https://example.com/model", says="--model.pretrained"),
    "not UTF-8": Case(["--model.pretrained", "\udcff"], says="UTF-8"),
    "option in its place": Case("--model.pretrained --data.seed 3", says="expected one argument"),
}


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def index(model: Path, content: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(content)


@pytest.fixture
def copied(bench: Bench) -> Bench:
    """With a copy of the model in ``INPUTS`` that a case may change."""
    shutil.copytree(bench.model, bench.inputs / "model")
    return bench


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name: str, copied: Bench) -> None:
    copied.check(CONFIGS[name])


@pytest.mark.parametrize("name", WEIGHTS)
def test_files_of_the_folder(name: str, copied: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied.inputs)
    copied.check(WEIGHTS[name])


@pytest.mark.parametrize("name", PLACES)
def test_place(name: str, bench: Bench) -> None:
    bench.check(PLACES[name])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_file_that_may_not_be_read(name: str, copied: Bench) -> None:
    file = copied.inputs / "model" / name
    file.chmod(0)
    if not unreadable(file):
        pytest.skip("the superuser may read everything")
    copied.check(Case(USE, says="--model.pretrained"))
