"""Model folders that lie, are damaged, or are no models: refused before a weight is read, or pruned as they are."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hostile.harness import Bench, Case, Change, Says, Status, cases, edited, making

USE = "--model.pretrained INPUTS/model"
NUMBERS: list[Any] = [0, -1, 1.5, "4", [], True, 10**30]
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")

CASES: dict[str, Case] = {}


def config(status: Status = 2, says: Says = "--model.pretrained", **keys: Any) -> None:
    """The tiny model with ``keys`` in its config.json."""
    name = ", ".join(f"{key}={value!r:.40}" for key, value in keys.items())
    CASES[name] = Case(USE, status, says, edited("model", **keys), needs="model")


def files(name: str, change: Change, says: Says = (), status: int = 2) -> None:
    """The tiny model's folder after ``change``."""
    CASES[name] = Case(USE, status, says, lambda folder: change(folder / "model"), needs="model")


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

files("config is deep", replaced("config.json", "[" * 100_000), "--model.pretrained")
files("config has a huge number", replaced("config.json", '{"a": ' + "9" * 5000 + "}"), "--model.pretrained")
files("config is a pipe", replaced("config.json", os.mkfifo), "named pipe")
files("config is a device", replaced("config.json", lambda path: path.symlink_to("/dev/zero")), "device")
files("config links to itself", replaced("config.json", lambda path: path.symlink_to(path)), "no config.json")
files("config is huge", replaced("config.json", lambda path: sparse(path, 10**11)), "bytes")
files("weights are gone", replaced("model.safetensors", lambda path: None), "neither model.safetensors")
files("weights are a pipe", replaced("model.safetensors", os.mkfifo), "--model.pretrained")
files("weights claim much", replaced("model.safetensors", b"\xff" * 7 + b"\x7f" + b"{}"), "is damaged")
files("weights are a pickle", replaced("model.safetensors", lambda path: torch.save({}, path)), "damaged")
files("weights are cut", lambda m: os.truncate(m / "model.safetensors", 50_000), "damaged")
files("no tensors", edit_tensors(dict.clear), "weights have 0 layers")
files("a bias too many", edit_tensors(lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(32)})))
files("an adapter", edit_tensors(lambda t: t.update({"model.layers.0.lora_A": torch.ones(3)})), "not part of")
files("a tensor missing", edit_tensors(lambda t: t.pop("model.norm.weight")), "lack 1 tensors")
files("whole numbers", edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(32).int()})), "I32")
files("two heads", edit_tensors(lambda t: t.update({"lm_head.weight": torch.ones(96, 32)})), "both are stored")
files("a rotary table", edit_tensors(lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(4)})), status=0)
files("index leads out", lambda m: index(m, '{"weight_map": {"a": "../../x.safetensors"}}'), "not the name")
files("index leads nowhere", lambda m: index(m, '{"weight_map": {"a": "x.safetensors"}}'), "does not exist")
files("index names a pickle", lambda m: index(m, '{"weight_map": {"a": "x.bin"}}'), "not the name")
files("generation config is text", replaced("generation_config.json", "x"), "the generation config")
files("generation config is a pipe", replaced("generation_config.json", os.mkfifo), status=0)
files("an adapter config", lambda m: (m / "adapter_config.json").write_text("{}"), "adapter")
files("tokenizer is text", lambda m: (m / "tokenizer.json").write_text("x"), status=0)

for file in ("config.json", "model.safetensors"):
    files(f"{file} may not be read", lambda m, file=file: lock(m / file), "--model.pretrained")

CASES |= {
    "no name": Case("--model.pretrained=", says="--model.pretrained"),
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


def lock(path: Path) -> None:
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("the superuser may read everything")


@cases(CASES)
def test_model(case: Case, bench: Bench) -> None:
    bench.check(case)
