"""Configs as they lie on the hub: what is missing, null, old or padded is read as transformers reads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_prune.methods import HGSP, Magnitude
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import open_layered
from tests.cutting import CPU
from tests.methods.behaviour import prune
from tests.methods.running import pruned_by, run_method
from tests.tiny import make_tiny, tiny_tokenizer, tiny_tokens

Edit = Callable[[dict[str, Any]], None]


def without(*names: str) -> Edit:
    return lambda config: [config.pop(name) for name in names] and None


def null(*names: str) -> Edit:
    return lambda config: config.update(dict.fromkeys(names))


def as_before_version_5(config: dict[str, Any]) -> None:
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": 500.0, "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    assert rope["rope_theta"] != 500.0
    config["transformers_version"] = "4.40.0"


def old_rope_scaling(config: dict[str, Any]) -> None:
    as_before_version_5(config)
    config["rope_scaling"] = {"type": "linear", "factor": 4.0}


def old_gemma_3(config: dict[str, Any]) -> None:
    del config["rope_parameters"], config["layer_types"]
    config |= {"rope_theta": 700.0, "rope_local_base_freq": 30.0, "sliding_window_pattern": 2}


ODD: dict[str, tuple[str, dict[str, Any], Edit]] = {
    **{f"{name} without head_dim": (name, {}, without("head_dim")) for name in ("llama", "qwen2", "phi3", "granite")},
    "mistral with a null head_dim": ("mistral", {}, null("head_dim")),
    "llama without KV heads": ("llama", {"kv_heads": 4}, without("num_key_value_heads")),
    **{
        f"{name} with null KV heads": (name, {"kv_heads": 4}, null("num_key_value_heads"))
        for name in ("llama", "olmo2", "granite")
    },
    "llama of version 4": ("llama", {}, as_before_version_5),
    "qwen2 of version 4": ("qwen2", {}, as_before_version_5),
    "llama with rope_scaling": ("llama", {}, old_rope_scaling),
    "gemma3 of version 4": ("gemma3_text", {}, old_gemma_3),
    "gemma2 without layer_types": ("gemma2", {}, without("layer_types")),
}


@pytest.mark.parametrize("name", [name if "4" in name else pytest.param(name, marks=pytest.mark.slow) for name in ODD])
@torch.no_grad()
def test_odd_configs_give_the_logits_of_transformers_and_are_pruned(tmp_path: Path, name: str) -> None:
    family, options, edit = ODD[name]
    dense = make_tiny(family, **options)
    dense.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))
    expected: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    tokens = tiny_tokens()
    model = open_layered(Checkpoint.open(str(tmp_path / "dense")), None, CPU)
    assert torch.equal(model.logits(tokens), expected(tokens).logits)
    with torch.enable_grad():
        method = run_method(HGSP(str(tmp_path / "dense"), 0.2), tiny_tokens(4, 12), tmp_path / "run")
    assert torch.isfinite(pruned_by(method)(tokens).logits).all()
    assert "head_dim" in json.loads((tmp_path / "run" / "pruned" / "config.json").read_text())


def test_a_vocabulary_larger_than_the_tokenizers_and_a_pad_token_outside_it(tmp_path: Path) -> None:
    model = make_tiny()
    model.resize_token_embeddings(100, pad_to_multiple_of=64)
    model.config.pad_token_id = -1
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    assert model.config.vocab_size == 128
    np.save(tmp_path / "tokens.npy", tiny_tokens(6, 12).numpy())
    run = prune(Magnitude(str(tmp_path / "dense"), 0.2), tmp_path / "tokens.npy", tmp_path / "runs")
    pruned = AutoModelForCausalLM.from_pretrained(run.pruned, trust_remote_code=True)
    logits = pruned(tiny_tokens()).logits
    assert logits.shape[-1] == 128
    assert torch.isfinite(logits).all()
    assert len(Checkpoint.open(str(run.pruned)).tokenizer) == 96  # type: ignore[arg-type]
