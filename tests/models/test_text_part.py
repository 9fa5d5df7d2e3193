"""From a folder that holds a text model with a vision tower, the text model is taken."""

import json
import re
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import lightning_prune
from lightning_prune.checkpoint.write import write_pruned
from lightning_prune.methods import REAP, ShortGPT, Wanda
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import open_layered
from lightning_prune.support.errors import UserError
from tests.cutting import CPU
from tests.methods.running import run_method
from tests.tiny import make_moe, make_tiny, tiny_config, tiny_plan, tiny_tokens

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
SEES = {"hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
DEEP = {"deepstack_visual_indexes": [1], "num_position_embeddings": 16}
VISIONS: dict[str, dict[str, Any]] = {
    "gemma3": VISION | {"model_type": "siglip_vision_model"},
    "gemma4": VISION | {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
    "mistral3": VISION | {"model_type": "pixtral"},
    "qwen2_vl": {"hidden_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4},
    "qwen2_5_vl": SEES | {"fullatt_block_indexes": [1]},
    "qwen3_vl": SEES | DEEP,
}
TEXT = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "mistral3": "ministral3", "qwen3_5": "qwen3_5_text"} | {
    kind: kind.partition("_")[0] for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
}


def tower(kind: str) -> str:
    """A part of the names of its tensors."""
    return "visual" if kind.startswith("qwen") else "vision_tower"


def several(kind: str, folder: Path, own_names: bool = False, tied: bool = True) -> Tensor:
    """Save a tiny model that sees and reads; its logits for text alone."""
    experts = kind == "qwen3_5_moe"
    text = (
        make_moe(f"{kind}_text", width=32, tied=tied).config if experts else tiny_config(TEXT[kind], tied=tied)
    ).to_dict()
    tokens = {"image_token_index": 95}
    if kind == "gemma4":
        text["pad_token_id"] = 0
        tokens = {"image_token_id": 95, "video_token_id": 95, "audio_token_id": 95}
    if kind.startswith("qwen"):
        tokens = {"image_token_id": 95, "video_token_id": 95, "vision_start_token_id": 95, "vision_end_token_id": 95}
    if kind.endswith("_vl"):
        rotary = {"mrope_section": [2, 1, 1]} | ({"mrope_interleaved": True} if kind == "qwen3_vl" else {})
        text |= {"model_type": f"{kind}_text", "rope_parameters": text["rope_parameters"] | rotary}
    vision = VISIONS.get(kind, SEES | {"out_hidden_size": text["hidden_size"]})
    config = AutoConfig.for_model(
        kind, text_config=text, vision_config=vision, tie_word_embeddings=tied, dtype="float32", **tokens
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    assert any(tower(kind) in name for name in load_file(file))
    if own_names:  # as modules are called: model.language_model.layers …
        state = {name: tensor for name, tensor in model.state_dict().items() if not (tied and "lm_head" in name)}
        save_file(state, file, {"format": "pt"})
    with torch.no_grad():
        logits: Tensor = model(input_ids=tiny_tokens().clamp(max=94)).logits
    return logits


def edited(folder: Path, outer: Any, inner: Any) -> None:
    """``tie_word_embeddings`` as it is written outside and inside; absent: not at all. Token ids are in either."""
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"eos_token_id": [1, 5], "bos_token_id": 7, "quantization_config": {"quant_method": "fp8"}}
    raw["text_config"].pop("eos_token_id", None)
    raw["text_config"]["bos_token_id"] = 3
    for part, value in ((raw, outer), (raw["text_config"], inner)):
        part.pop("tie_word_embeddings", None)
        part |= {} if value == "absent" else {"tie_word_embeddings": value}
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("written", ["inside", "outside", "inside against outside", "null", "nowhere"])
@pytest.mark.parametrize("kind", TEXT)
@torch.no_grad()
def test_whether_the_head_is_the_embedding_and_token_ids_of_the_outer_config(
    tmp_path: Path, kind: str, written: str, tied: bool
) -> None:
    expected = several(kind, tmp_path, tied=tied)
    inner = tied if "inside" in written else None if written == "null" else "absent"
    outer = tied if written == "outside" else (not tied) if "against" in written else "absent"
    edited(tmp_path, outer, inner)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.config.tie_word_embeddings is tied
    assert (checkpoint.config.eos_token_id, checkpoint.config.bos_token_id) == ([1, 5], 3)
    with pytest.warns(UserWarning, match=rf"left out: .*{tower(kind)} \(\d+\)"):
        checkpoint.check()
    torch.testing.assert_close(
        checkpoint.load(None)(tiny_tokens().clamp(max=94)).logits, expected, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_other_models_of_several_are_refused_and_their_text_model_is_taken(tmp_path: Path) -> None:
    vision = VISION | {"model_type": "clip_vision_model"}
    config = AutoConfig.for_model("llava", vision_config=vision, text_config=tiny_config().to_dict())
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match=r"made of several models.*docs/families\.md"):
        Checkpoint.open(str(tmp_path / "dense"))
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(code.replace("path/to/llava", str(tmp_path / "dense")).replace("path/to/text", str(tmp_path / "text")), {})
    text = Checkpoint.open(str(tmp_path / "text")).load(None)
    assert torch.equal(text(tiny_tokens()).logits, whole(tiny_tokens()).logits)


@pytest.mark.parametrize("own_names", [True, False])
@pytest.mark.parametrize("kind", TEXT)
@torch.no_grad()
def test_the_whole_model_is_written_around_a_pruned_text_model(tmp_path: Path, kind: str, own_names: bool) -> None:
    several(kind, tmp_path / "dense", own_names, tied=kind == "gemma3")
    tokens, dense = tiny_tokens(4, 12).clamp(max=94), load_file(tmp_path / "dense" / "model.safetensors")
    method = Wanda(str(tmp_path / "dense"), 0.2, allocation="uniform", keep="whole")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*left out")
        folder = run_method(method, tokens, tmp_path / "run").pruned_folder
    assert folder is not None
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    whole: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert type(whole) is type(AutoModelForImageTextToText.from_pretrained(tmp_path / "dense"))
    text = Checkpoint.open(str(folder))
    logits = open_layered(text, None, CPU).logits(tokens)
    torch.testing.assert_close(whole(input_ids=tokens).logits, logits, rtol=1e-5, atol=1e-5)
    assert sum(parameter.numel() for parameter in text.meta.parameters()) == method.plan.parameters["pruned"]
    written = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert written.keys() == dense.keys()
    beside = [name for name in dense if tower(kind) in name or "projector" in name]
    assert beside
    assert all(torch.equal(written[name], dense[name]) for name in beside)
    assert "AutoModelForImageTextToText" in (folder / "README.md").read_text()
    applied = lightning_prune.apply(method.plan, tmp_path / "dense", tmp_path / "applied")
    assert all((applied / file.name).read_bytes() == file.read_bytes() for file in folder.glob("*.safetensors"))
    assert (applied / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    again = run_method(ShortGPT(str(folder), n_remove_layers=1, keep="whole"), tokens, tmp_path / "again")
    assert len(again.plan.removed_layers) == 1
    AutoModelForImageTextToText.from_pretrained(again.pruned_folder)


def test_what_is_not_pruned_is_written_bit_for_bit_whatever_its_dtype(tmp_path: Path) -> None:
    several("gemma3", tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    kinds = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float64]
    odd = {f"vision_tower.{kind}": torch.ones(3, 1).to(kind) for kind in kinds}
    odd["vision_tower.number"] = torch.tensor(2)
    save_file(load_file(file) | odd, file, {"format": "pt"})
    dense = Checkpoint.open(str(tmp_path / "dense"))
    plan = tiny_plan(dense.meta, [([0, 1], list(range(30)))] * 4, keep="whole")
    write_pruned(dense, plan, lambda layer: {}, tmp_path / "pruned")
    written = load_file(tmp_path / "pruned" / "model-00002-of-00002.safetensors")
    for name, tensor in odd.items():
        assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(written[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def as_published(folder: Path) -> None:
    """The keys of the text model among those of the whole, as Qwen2-VL and Qwen2.5-VL are published."""
    raw = json.loads((folder / "config.json").read_text())
    text = {key: value for key, value in raw.pop("text_config").items() if key != "model_type"}
    rotary = text.pop("rope_parameters")
    text["rope_theta"] = rotary.pop("rope_theta")
    rotary.pop("rope_type")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rotary["mrope_section"]}
    (folder / "config.json").write_text(json.dumps(raw | text))


@pytest.mark.parametrize(
    ("kind", "flat"), [("qwen2_vl", True), ("qwen2_5_vl", True), ("qwen2_5_vl", False), ("qwen3_vl", False)]
)
@torch.no_grad()
def test_what_is_seen_is_computed_as_in_the_dense_model_without_the_layer(
    tmp_path: Path, kind: str, flat: bool
) -> None:
    several(kind, tmp_path / "dense")
    whole: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense").eval()
    if flat:
        as_published(tmp_path / "dense")
    dense = Checkpoint.open(str(tmp_path / "dense"))
    plan = tiny_plan(dense.meta, [([0, 1], list(range(40)))] * 2 + [([], []), ([0, 1], list(range(40)))], keep="whole")
    write_pruned(dense, plan, lambda layer: {}, tmp_path / "pruned")
    pruned: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "pruned").eval()
    assert not json.loads((tmp_path / "pruned" / "config.json").read_text()).keys() & {"hidden_size", "rope_scaling"}
    assert dense.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert pruned.config.text_config.rope_parameters["mrope_section"] == [2, 1, 1]
    del whole.model.language_model.layers[2]
    tokens = tiny_tokens(1, 12).clamp(max=94)
    tokens[:, 3:7] = 95
    image = torch.randn(16, 96, generator=torch.Generator().manual_seed(3))
    inputs = {"pixel_values": image, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    inputs |= {"input_ids": tokens, "mm_token_type_ids": (tokens == 95).int()}
    seen = pruned(**inputs).logits
    assert torch.equal(seen, whole(**inputs, use_cache=False).logits)
    assert not torch.equal(seen, pruned(**inputs | {"pixel_values": -image}).logits)


@pytest.mark.parametrize(("removed", "alone"), [(0, True), (1, False)])
def test_layers_that_the_tower_adds_features_to_are_not_removed_from_the_whole(
    tmp_path: Path, removed: int, alone: bool
) -> None:
    several("qwen3_vl", tmp_path / "dense")  # one tensor of features, after layer 0
    dense = Checkpoint.open(str(tmp_path / "dense"))
    kept = [([], []) if layer == removed else ([0, 1], list(range(40))) for layer in range(4)]
    why = "the first 1; remove channels or groups there"
    with pytest.warns(UserWarning, match=why) if alone else nullcontext():
        write_pruned(dense, tiny_plan(dense.meta, kept, keep="whole"), lambda layer: {}, tmp_path / "pruned")
    written = json.loads((tmp_path / "pruned" / "config.json").read_text())["model_type"]
    assert written == ("qwen3" if alone else "qwen3_vl")


@torch.no_grad()
def test_a_mixture_that_sees_loses_experts_and_stays_whole(tmp_path: Path) -> None:
    expected, tokens = several("qwen3_5_moe", tmp_path / "dense", tied=False), tiny_tokens(4, 12).clamp(max=94)
    dense = open_layered(Checkpoint.open(str(tmp_path / "dense")), None, CPU)
    torch.testing.assert_close(dense.logits(tiny_tokens().clamp(max=94)), expected, rtol=1e-5, atol=1e-5)
    folder = run_method(REAP(str(tmp_path / "dense"), 0.3, keep="whole"), tokens, tmp_path / "run").pruned_folder
    whole: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert whole.config.text_config.num_experts < dense.config.num_experts
    logits = open_layered(Checkpoint.open(str(folder)), None, CPU).logits(tokens)
    torch.testing.assert_close(whole(input_ids=tokens).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "keep", "why"),
    [
        ("gemma3", "text", ""),
        ("gemma3", "whole", "layers differ in width"),
        ("llama", "whole", "a text model and nothing else"),
    ],
)
def test_the_text_model_is_written_where_it_should_or_the_whole_cannot(
    tmp_path: Path, kind: str, keep: Literal["text", "whole"], why: str
) -> None:
    if kind == "llama":
        make_tiny().save_pretrained(tmp_path / "dense")
    else:
        several(kind, tmp_path / "dense")
    method = Wanda(str(tmp_path / "dense"), 0.2, keep=keep)
    alone = f"keep whole: the text model alone is written, because .*{why}"
    with pytest.warns(UserWarning, match=alone) if why else nullcontext():
        run_method(method, tiny_tokens(4, 12).clamp(max=94), tmp_path / "run")
    folder = tmp_path / "run" / "pruned"
    assert lightning_prune.load(str(folder)).config.model_type == TEXT.get(kind, kind)
    assert not [name for name in load_file(folder / "model.safetensors") if "vision" in name]
