"""The shipped model: loads anywhere, has something to prune, and has learned its text."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_prune.demo import demo_model_path, demo_text


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype="auto").eval()


def test_folder_holds_safetensors_and_no_pickle():
    names = {path.name for path in demo_model_path().iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in demo_model_path().iterdir()) < 6_000_000


def test_model_is_a_bf16_gqa_llama_with_room_to_prune(model):
    config = model.config
    assert config.model_type == "llama"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert config.num_hidden_layers >= 6
    assert config.num_key_value_heads >= 4
    assert config.num_attention_heads > config.num_key_value_heads
    assert model.model.layers[0].self_attn.k_proj.out_features == config.num_key_value_heads * config.head_dim
    total = sum(p.numel() for p in model.parameters())
    prunable = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    assert total <= 3_000_000
    assert prunable > 0.8 * total


def test_tokenizer_is_lossless_and_fits_the_model(tokenizer, model):
    text = demo_text("test", 50)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert max(ids) < model.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer("naïve 語")["input_ids"], skip_special_tokens=True) == "naïve 語"


def test_splits_are_large_enough_to_calibrate_and_to_measure(tokenizer):
    half_of_train = demo_text("train", 2000)
    assert len(tokenizer(half_of_train)["input_ids"]) > 20 * 128 * 128
    assert 20_000 < len(tokenizer(demo_text("test"))["input_ids"]) < 45_000


def test_model_predicts_held_out_text_far_better_than_word_frequencies(tokenizer, model):
    """Against the best unigram model there is for this very text: its own token counts."""
    ids = tokenizer(demo_text("test"))["input_ids"]
    windows = torch.tensor(ids[: 80 * 128]).view(80, 128)
    with torch.no_grad():
        logits = model.float()(input_ids=windows, use_cache=False).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()

    counts = Counter(windows[:, 1:].flatten().tolist())
    total = sum(counts.values())
    unigram_nats = -sum(n / total * math.log(n / total) for n in counts.values())
    assert math.exp(nats) < 0.1 * math.exp(unigram_nats)


def test_model_uses_the_story_so_far(tokenizer, model):
    """Told another story's beginning, it predicts worse: its attention has something to lose."""
    ids = tokenizer(demo_text("test"))["input_ids"]
    own = torch.tensor(ids[: 80 * 128]).view(80, 128)
    foreign = torch.cat([own.roll(1, dims=0)[:, :96], own[:, 96:]], dim=1)

    def nats(windows: torch.Tensor) -> float:
        with torch.no_grad():
            logits = model.float()(input_ids=windows, use_cache=False).logits[:, 100:-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 101:].flatten()).item()

    assert nats(foreign) > nats(own) + 0.15
