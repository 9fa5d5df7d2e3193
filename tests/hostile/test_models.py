"""Model folders that lie, are damaged, or are no models: refused before a weight is read, or pruned as they are."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hostile.harness import Bench, Case, Change, Says, Status, making, unreadable

USE = "--model.pretrained INPUTS/model"
NUMBERS: list[Any] = [0, -1, 1.5, "4", [], True, 10**30]
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")

CONFIGS: dict[str, Case] = {}  # one key of config.json replaced
WEIGHTS: dict[str, Case] = {}  # files of the folder damaged


def config(status: Status = 2, says: Says = "--model.pretrained", **keys: Any) -> None:
    """One case: the tiny model with ``keys`` in its config.json."""
    name = ", ".join(f"{key}={value!r:.40}" for key, value in keys.items())
    CONFIGS[name] = Case(USE, status, says, lambda folder: edit_config(folder / "model", keys))


def weights(name: str, change: Change, says: Says = (), status: int = 2) -> None:
    """One case: the tiny model's folder after ``change``."""
    WEIGHTS[name] = Case(USE, status, says, lambda folder: change(folder / "model"))


def edit_config(model: Path, keys: dict[str, Any]) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def run(model: Path) -> None:
        file = model / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return run


def replaced(name: str, content: Change | str | bytes) -> Change:
    def run(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        making(content)(model / name)

    return run


for value in NUMBERS:
    config(num_hidden_layers=value)
    config(status=(0, 2) if value == 0 else 2, head_dim=value)  # 0 and null: hidden_size / heads
for key in SIZES:
    for value in (0, "4", 10**30):
        config(**{key: value})
for key in ("num_hidden_layers", *SIZES):
    config(status=2 if key != "num_key_value_heads" else (0, 2), **{key: None})
config(num_hidden_layers=100_000, says="weights have 4 layers")
config(intermediate_size=39, says=("shape", "[32, 40]", "[32, 39]"))
config(head_dim=16, says="shape")
config(model_type="gpt2", says="'gpt2' is not supported")
config(model_type="qwen2", says="lack 12 tensors")
config(tie_word_embeddings=False, says="'lm_head.weight'")
config(hidden_act="nothing")
config(rms_norm_eps="x", status=(0, 2))
config(rope_parameters={"rope_type": "nothing", "rope_theta": 1e4})
config(rope_parameters={"rope_type": "default", "rope_theta": "x"})
config(max_position_embeddings=8, says="positions")
config(dtype="float3")
config(architectures=["BertModel"], status=0)
config(auto_map={"AutoModelForCausalLM": "evil.Evil"}, status=(0, 2))
config(quantization_config={"quant_method": "gptq", "bits": 4}, says="quantization_config", status=0)
config(per_layer_config={"0": {"intermediate_size": 8}})
config(per_layer_config={"0": {"skip": ["everything"]}})
config(transformers_weights="../model.safetensors", status=(0, 2))

weights("config is deep", replaced("config.json", "[" * 100_000), "--model.pretrained")
weights("config has a huge number", replaced("config.json", '{"a": ' + "9" * 5000 + "}"), "--model.pretrained")
weights("config is a pipe", replaced("config.json", os.mkfifo), "named pipe")
weights("config is a device", replaced("config.json", lambda path: path.symlink_to("/dev/zero")), "device")
weights("config links to itself", replaced("config.json", lambda path: path.symlink_to(path)), "no config.json")
weights("config is huge", replaced("config.json", lambda path: sparse(path, 10**11)), "bytes")
weights("weights are gone", replaced("model.safetensors", lambda path: None), "neither model.safetensors")
weights("weights are a pipe", replaced("model.safetensors", os.mkfifo), "--model.pretrained")
weights("weights claim much", replaced("model.safetensors", b"\xff" * 7 + b"\x7f" + b"{}"), "is damaged")
weights("weights are a pickle", replaced("model.safetensors", lambda path: torch.save({}, path)), "damaged")
weights("weights are cut", lambda m: os.truncate(m / "model.safetensors", 50_000), "damaged")
weights("no tensors", edit_tensors(dict.clear), "weights have 0 layers")
weights("a bias too many", edit_tensors(lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(32)})))
weights("an adapter", edit_tensors(lambda t: t.update({"model.layers.0.lora_A": torch.ones(3)})), "not part of")
weights("a tensor missing", edit_tensors(lambda t: t.pop("model.norm.weight")), "lack 1 tensors")
weights("whole numbers", edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(32).int()})), "I32")
weights("two heads", edit_tensors(lambda t: t.update({"lm_head.weight": torch.ones(96, 32)})), "both are stored")
weights("a rotary table", edit_tensors(lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(4)})), status=0)
weights("index leads out", lambda m: index(m, '{"weight_map": {"a": "../../x.safetensors"}}'), "not the name")
weights("index leads nowhere", lambda m: index(m, '{"weight_map": {"a": "x.safetensors"}}'), "does not exist")
weights("index names a pickle", lambda m: index(m, '{"weight_map": {"a": "x.bin"}}'), "not the name")
weights("generation config is text", replaced("generation_config.json", "x"), "the generation config")
weights("generation config is a pipe", replaced("generation_config.json", os.mkfifo), status=0)
weights("an adapter config", lambda m: (m / "adapter_config.json").write_text("{}"), "adapter")
weights("tokenizer is text", lambda m: (m / "tokenizer.json").write_text("x"), status=0)

PLACES = {
    "empty name": Case("--model.pretrained=", says="--model.pretrained"),
    "null": Case("--model.pretrained null", says="needs a value"),
    "file": Case("--model.pretrained INPUTS/f", 2, "--model.pretrained", lambda folder: (folder / "f").write_text("")),
    "pipe": Case("--model.pretrained INPUTS/f", 2, "--model.pretrained", lambda folder: os.mkfifo(folder / "f")),
    "too long": Case(f"--model.pretrained /{'a' * 5000}", says="--model.pretrained"),
    "loop": Case("--model.pretrained INPUTS/l", 2, "--model", lambda folder: (folder / "l").symlink_to(folder / "l")),
    "nobody's home": Case("--model.pretrained ~nobody-here/x", says="home folder"),
    "web address": Case("--model.pretrained https://example.com/model", says="--model.pretrained"),
    "not UTF-8": Case(["--model.pretrained", "\udcff"], says="UTF-8"),
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
