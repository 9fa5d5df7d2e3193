"""What is in a GGUF file. That llama.cpp computes the same from it is seen in ``tests/engines``."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from lightning_prune.cli import main
from lightning_prune.formats.gguf_file import interleaved
from tests.formats.checkpoints import FAMILIES, gone, save, watch_reads
from tests.tiny import EVERY_FAMILY, mixed_plan


def export(folder: Path, *options: str) -> int:
    output = str(folder.parent / "m.gguf")
    return main(["export", "--model", str(folder), "--format", "gguf", "--output", output, *options])


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(fields, tensors as fp32 where the type is a float)."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def test_rows_in_the_other_rotary_order_give_the_same_attention_scores() -> None:
    """transformers turns (i, i + d/2) together, the format (2 i, 2 i + 1)."""
    dim, hidden, position = 8, 16, 5.0
    torch.manual_seed(0)
    query, key = torch.randn(2, 2 * dim, hidden, dtype=torch.float64)
    x, y = torch.randn(2, hidden, dtype=torch.float64)
    angles = position / 100.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def turned(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])

    for head in range(2):
        rows = slice(head * dim, (head + 1) * dim)
        expected = turned(*(query @ x)[rows].chunk(2)) @ (key @ y)[rows]
        written, other = ((interleaved(query, dim) @ x)[rows], (interleaved(key, dim) @ y)[rows])
        torch.testing.assert_close(
            turned(written[0::2], written[1::2]) @ torch.cat([other[0::2], other[1::2]]), expected
        )
        torch.testing.assert_close(interleaved(query @ x, dim)[rows], written)  # a bias is a column


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_read_alone_and_in_the_file_under_the_name_that_the_format_gives_it(
    family: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reads = save(tmp_path / "model", family, tied=tied), watch_reads(monkeypatch)
    assert export(tmp_path / "model", "--dtype", "f32") == 0
    assert max(map(len, reads)) == 1
    fields, tensors = read(tmp_path / "m.gguf")
    assert fields["general.architecture"] == {"mistral": "llama"}.get(family, family)
    kind = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}[family]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind], 4)
    expected = {
        names.get_name(name, try_suffixes=(".weight", ".bias")): parameter
        for name, parameter in model.named_parameters()
    }
    assert set(tensors) == set(expected)
    for name, parameter in expected.items():
        written, values = tensors[name], parameter.detach().numpy()
        if kind == "LLAMA" and name.split(".")[-2] in ("attn_q", "attn_k"):  # in another order of rows
            written, values = np.sort(written, axis=0), np.sort(values, axis=0)
        np.testing.assert_array_equal(written, values, err_msg=name)


def test_widths_of_every_layer_are_arrays(tmp_path: Path) -> None:
    """The mixed plan leaves [no attention, 40], [1 of 2 KV heads, 20], [2, no MLP] of 4 query heads of size 8."""
    save(tmp_path / "model", plan=mixed_plan)
    assert export(tmp_path / "model") == 0
    fields, tensors = read(tmp_path / "m.gguf")
    assert fields["general.architecture"] == "deci"
    assert fields["deci.block_count"] == 3
    # The engine asks layer 0 whether there is attention at all, and forgets the attention of a layer without MLP.
    assert fields["deci.attention.head_count"] == [1, 2, 4]
    assert fields["deci.attention.head_count_kv"] == [1, 1, 2]
    assert fields["deci.feed_forward_length"] == [40, 20, 32]
    assert fields["deci.attention.key_length"] == fields["deci.rope.dimension_count"] == 8
    assert not tensors["blk.0.attn_output.weight"].any()
    assert not tensors["blk.2.ffn_down.weight"].any()
    assert tensors["blk.2.attn_output.weight"].any()

    save(tmp_path / "later" / "model", plan=gone("attention", 2))  # needs no tensors of zeros
    assert export(tmp_path / "later" / "model") == 0
    fields, tensors = read(tmp_path / "later" / "m.gguf")
    assert fields["deci.attention.head_count"] == [4, 4, 0, 2]
    assert not [name for name in tensors if name.startswith("blk.2.attn")]


@pytest.mark.parametrize(
    ("stored", "options", "kind"),
    [
        (torch.bfloat16, [], "BF16"),
        (torch.float16, [], "F16"),
        (torch.float32, [], "F32"),
        (torch.float32, ["--dtype", "q8_0"], "Q8_0"),
    ],
)
def test_matrices_have_the_requested_dtype_and_vectors_fp32(
    stored: torch.dtype, options: list[str], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "model", plan=mixed_plan, dtype=stored)
    assert export(tmp_path / "model", *options) == 0
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.attn_q.weight"] == kind
    assert kinds["output_norm.weight"] == "F32"
    # 40 and 20 channels, and 1 or 2 heads of 8, are no rows of whole blocks of 32.
    narrow = {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight", "blk.0.attn_output.weight", "blk.1.attn_output.weight"}
    assert {kinds[name] for name in narrow} == {"F16" if kind == "Q8_0" else kind}
    assert ("4 matrices are in f16" in capsys.readouterr().out) == (kind == "Q8_0")


ROPE = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
STOCK = "family 'phi3': .* It is a stock folder, which llama.cpp"
REFUSED = {
    # family, whether it has widths per layer, options → words of the refusal
    "untied": ("qwen3", True, {"tied": False}, "embeddings that are not tied .*'openelm' has no head"),
    "bias": ("qwen3", True, {"attention_bias": True}, "bias of k_proj, o_proj, q_proj, v_proj"),
    "activation": ("llama", True, {"hidden_act": "gelu"}, "activation 'gelu'"),
    "rope": ("llama", True, ROPE, "rotary scaling 'dynamic'"),
    "one width, which padding would not help": ("phi3", False, {}, STOCK),
    **{
        family: (family, True, {}, f"family '{family}': exported are llama, mistral, qwen2, qwen3. Use --format stock")
        for family in EVERY_FAMILY
        if family not in FAMILIES
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_architecture_holds_is_refused_with_its_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, per_layer, options, says = REFUSED[name]
    save(tmp_path / "model", family, mixed_plan if per_layer else None, **options)
    assert export(tmp_path / "model") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "cannot hold" in line
    assert re.search(says, line)
    assert ("--format stock" in line) == per_layer
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_value_beyond_f16_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "model")
    assert export(tmp_path / "model", "--dtype", "f16") == 2
    assert "'model.layers.1.mlp.up_proj.weight' has values that f16 cannot hold" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert export(tmp_path / "model", "--dtype", "bf16") == 0


def test_a_sliding_window_shortens_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "model", "mistral", plan=mixed_plan, sliding_window=32)
    assert export(tmp_path / "model") == 0
    assert "the context is 32 tokens" in capsys.readouterr().out
    assert read(tmp_path / "m.gguf")[0]["deci.context_length"] == 32
