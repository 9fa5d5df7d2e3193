"""Exports nobody should ask for: refused in one sentence, and what stood at the output is as it was."""

import os

import pytest

from tests.hostile.harness import Bench, Case, Change, Says, cases, edited

GGUF = "--format gguf"
CASES: dict[str, Case] = {}


def case(name: str, arguments: str = "", says: Says = "", status: int = 2, prepare: Change | None = None) -> None:
    """An export of a pruned folder, INPUTS/pruned, after ``prepare`` changed INPUTS."""
    CASES[name] = Case(arguments, status, says, prepare, command="export", needs="pruned")


def without(file: str) -> Change:
    return lambda folder: (folder / "pruned" / file).unlink()


case("stock", status=0)
case("GGUF", GGUF, status=0)
case("no such format", "--format onnx", "--format")
case("dtype of a folder", "--dtype f16", "--dtype belongs to --format gguf")
case("model is missing", "--model INPUTS/nothing")
case("model is a dense folder", "--model MODEL", "a stock checkpoint already")
case("dense folder without a tokenizer", f"--model MODEL {GGUF}", "tokenizer.json")
case("model is nothing", "--model=", "--model is empty")
for form in ("stock", "gguf"):
    option = f"--format {form}"
    for file in ("config.json", "model.safetensors"):
        case(f"{form}: {file} is missing", option, prepare=without(file))
    case(f"{form}: weights are cut", option,
         prepare=lambda folder: os.truncate(folder / "pruned/model.safetensors", 5000))  # fmt: skip
    case(f"{form}: layers lie", option, prepare=edited("pruned", num_hidden_layers=9))
    case(f"{form}: widths lie", option, prepare=edited("pruned", per_layer_config={"0": {"intermediate_size": 3}}))
    case(f"{form}: widths are text", option, prepare=edited("pruned", per_layer_config="x"))
    case(f"{form}: family is unknown", option, prepare=edited("pruned", model_type="gpt2"))
    case(f"{form}: output's folder is a file", f"{option} --output INPUTS/pruned/config.json/x", "--output")
    case(f"{form}: output cannot be written", f"{option} --output /proc/x", "--output")
    case(f"{form}: output's name is too long", f"{option} --output {'x' * 300}", "--output")
    case(f"{form}: output is a pipe", f"{option} --output INPUTS/out", "exists" if form == "gguf" else "not a folder",
         prepare=lambda folder: os.mkfifo(folder / "out"))  # fmt: skip
    case(f"{form}: output links to itself", f"{option} --output INPUTS/out", "--output",
         prepare=lambda folder: (folder / "out").symlink_to("out"))  # fmt: skip
case("stock: modeling file is missing", status=0, prepare=without("modeling_pruned.py"))
case("gguf: modeling file is missing", GGUF, status=0, prepare=without("modeling_pruned.py"))
case("gguf: tokenizer is missing", GGUF, "the tokenizer cannot be loaded", prepare=without("tokenizer.json"))
case("gguf: tokenizer is cut", GGUF, prepare=lambda folder: os.truncate(folder / "pruned/tokenizer.json", 900))
case("gguf: output is a folder", f"{GGUF} --output INPUTS/pruned --overwrite", "a folder, and a GGUF model is a file")
case("stock: output is a file", "--output INPUTS/pruned/config.json --overwrite", "not a folder")
case("stock: output is the model", "--output INPUTS/pruned", "exists. Give another name")


@cases(CASES)
def test_export(case: Case, bench: Bench) -> None:
    if GGUF in case.arguments:
        pytest.importorskip("gguf")
    bench.check(case)
