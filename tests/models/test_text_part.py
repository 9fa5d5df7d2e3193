"""From a folder that holds a text model with a vision tower, the text model is taken."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import lightning_prune
from lightning_prune.methods import HGSP, REAP, ShortGPT, Wanda
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import open_layered
from lightning_prune.support.errors import UserError
from tests.cutting import CPU
from tests.methods.running import pruned_by, run_method
from tests.tiny import make_moe, make_tiny, tiny_config, tiny_tokens

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
SEES = {"hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
VISION_4 = VISION | {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}
TEXT = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "mistral3": "ministral3", "qwen3_5": "qwen3_5_text"}
BESIDE = {
    "gemma3": "vision_tower",
    "gemma4": "vision_tower",
    "mistral3": "vision_tower",
    "qwen3_5": "visual",
    "qwen3_5_moe": "visual",
}


def several(kind: str, folder: Path, own_names: bool = False, tied: bool = True) -> Tensor:
    """Save a tiny model that sees and reads; its logits for text alone."""
    experts = kind == "qwen3_5_moe"
    text = (
        make_moe(f"{kind}_text", width=32, tied=tied).config if experts else tiny_config(TEXT[kind], tied=tied)
    ).to_dict()
    vision = VISION | {"model_type": "pixtral" if kind == "mistral3" else "siglip_vision_model"}
    tokens = {"image_token_index": 95}
    if kind == "gemma4":
        vision, text["pad_token_id"] = VISION_4, 0
        tokens = {"image_token_id": 95, "video_token_id": 95, "audio_token_id": 95}
    if kind.startswith("qwen"):
        vision = SEES | {"out_hidden_size": text["hidden_size"]}
        tokens = {"image_token_id": 95, "video_token_id": 95, "vision_start_token_id": 95, "vision_end_token_id": 95}
    config = AutoConfig.for_model(
        kind, text_config=text, vision_config=vision, tie_word_embeddings=tied, dtype="float32", **tokens
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    names = load_file(file)
    assert any(BESIDE[kind] in name for name in names)
    assert any("language_model." in name for name in names)
    if own_names:  # as modules are called: model.language_model.layers …
        state = {name: tensor for name, tensor in model.state_dict().items() if not (tied and "lm_head" in name)}
        save_file(state, file, {"format": "pt"})
    with torch.no_grad():
        logits: Tensor = model(input_ids=tiny_tokens().clamp(max=94)).logits
    return logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("own_names", [True, False])
@pytest.mark.parametrize("kind", TEXT)
@torch.no_grad()
def test_the_text_model_gives_the_logits_of_the_whole_for_text(
    tmp_path: Path, kind: str, own_names: bool, tied: bool
) -> None:
    expected = several(kind, tmp_path, own_names, tied)
    tokens = tiny_tokens().clamp(max=94)
    assert Checkpoint.open(str(tmp_path)).config.model_type == TEXT[kind]
    logits = open_layered(Checkpoint.open(str(tmp_path)), None, CPU).logits(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    loaded = lightning_prune.load(tmp_path)
    assert torch.equal(loaded(tokens).logits, logits)
    loaded.save_pretrained(tmp_path / "text")
    assert torch.equal(lightning_prune.load(tmp_path / "text")(tokens).logits, logits)


def edited(folder: Path, outer: Any, inner: Any) -> None:
    """``tie_word_embeddings`` as it is written outside and inside; absent: not at all."""
    raw = json.loads((folder / "config.json").read_text())
    for part, value in ((raw, outer), (raw["text_config"], inner)):
        part.pop("tie_word_embeddings", None)
        part |= {} if value == "absent" else {"tie_word_embeddings": value}
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("written", ["inside", "outside", "inside against outside", "null", "nowhere"])
@pytest.mark.parametrize("kind", TEXT)
@torch.no_grad()
def test_whether_the_head_is_the_embedding(tmp_path: Path, kind: str, written: str, tied: bool) -> None:
    expected = several(kind, tmp_path, tied=tied)
    inner = tied if "inside" in written else None if written == "null" else "absent"
    outer = tied if written == "outside" else (not tied) if "against" in written else "absent"
    edited(tmp_path, outer, inner)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.config.tie_word_embeddings is tied
    with pytest.warns(UserWarning, match=rf"left out: .*{BESIDE[kind]} \(\d+\)"):
        checkpoint.check()
    torch.testing.assert_close(
        checkpoint.load(None)(tiny_tokens().clamp(max=94)).logits, expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", TEXT)
def test_token_ids_of_the_outer_config_where_the_text_has_none(tmp_path: Path, kind: str) -> None:
    several(kind, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"eos_token_id": [1, 5], "bos_token_id": 7, "quantization_config": {"quant_method": "fp8"}}
    raw["text_config"].pop("eos_token_id", None)
    raw["text_config"]["bos_token_id"] = 3
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = Checkpoint.open(str(tmp_path)).config
    assert (config.eos_token_id, config.bos_token_id) == ([1, 5], 3)


def test_it_is_pruned_to_a_text_model(tmp_path: Path) -> None:
    several("gemma3", tmp_path / "dense")
    method = run_method(HGSP(str(tmp_path / "dense"), 0.2), tiny_tokens(4, 12).clamp(max=94), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "pruned" / "config.json").read_text())
    assert config["model_type"] == "gemma3_text"
    assert not [name for name in load_file(tmp_path / "run" / "pruned" / "model.safetensors") if "vision" in name]
    assert type(pruned_by(method)).__name__ == "Gemma3ForCausalLM"


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
    folder = run_method(method, tokens, tmp_path / "run").pruned_folder
    assert folder is not None
    whole: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert type(whole) is type(AutoModelForImageTextToText.from_pretrained(tmp_path / "dense"))
    text = Checkpoint.open(str(folder))
    logits = open_layered(text, None, CPU).logits(tokens)
    torch.testing.assert_close(whole(input_ids=tokens).logits, logits, rtol=1e-5, atol=1e-5)
    assert sum(parameter.numel() for parameter in text.meta.parameters()) == method.plan.parameters["pruned"]
    written = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert written.keys() == dense.keys()
    beside = [name for name in dense if BESIDE[kind] in name or "projector" in name]
    assert beside
    assert all(torch.equal(written[name], dense[name]) for name in beside)
    assert "AutoModelForImageTextToText" in (folder / "README.md").read_text()
    again = run_method(ShortGPT(str(folder), n_remove_layers=1, keep="whole"), tokens, tmp_path / "again")
    assert len(again.plan.removed_layers) == 1
    AutoModelForImageTextToText.from_pretrained(again.pruned_folder)


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
    ("kind", "why"), [("gemma3", "layers differ in width"), ("llama", "a text model and nothing else")]
)
def test_where_the_whole_cannot_be_written_the_text_model_is(tmp_path: Path, kind: str, why: str) -> None:
    if kind == "llama":
        make_tiny().save_pretrained(tmp_path / "dense")
    else:
        several(kind, tmp_path / "dense")
    method = Wanda(str(tmp_path / "dense"), 0.2, keep="whole")
    with pytest.warns(UserWarning, match=f"keep whole: the text model alone is written, because .*{why}"):
        run_method(method, tiny_tokens(4, 12).clamp(max=94), tmp_path / "run")
    assert lightning_prune.load(str(method.pruned_folder)).config.model_type == TEXT.get(kind, kind)
