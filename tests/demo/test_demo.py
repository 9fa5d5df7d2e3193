"""The shipped model and its text: they load anywhere, belong together, and `tools/demo` makes them again."""

import hashlib
import json
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_prune.demo import demo_model_path, demo_text
from lightning_prune.support.errors import UserError
from tools.demo.text import stories
from tools.demo.train import token_windows, train, train_tokenizer

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
TRAIN_SHA256 = "36eaf983cf308c488a1758ee49ce5b14e5d970a6ffe440b3f566bf4c10a874f8"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype="auto").eval()


def test_text_is_the_one_the_shipped_model_was_trained_on_and_its_splits_share_no_story():
    """Frozen on purpose: whoever changes the text must train the model anew and then this digest."""
    assert hashlib.sha256(demo_text("train").encode()).hexdigest() == TRAIN_SHA256
    texts = [set(demo_text(split).strip().split("\n\n")) for split in ("train", "validation", "test")]
    assert [len(one) for one in texts] == [4000, 200, 200]
    assert len(set.union(*texts)) == 4400
    with pytest.raises(UserError, match=r"split 'dev'.*train, validation, test"):
        demo_text("dev")


def test_text_needs_no_torch():
    program = "import sys, lightning_prune.demo; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize("split", ["validation", "test", pytest.param("train", marks=pytest.mark.slow)])
def test_the_grammar_tells_the_shipped_text(split):
    assert stories(split) == demo_text(split)


def test_model_is_a_small_bf16_gqa_llama_with_room_to_prune(model):
    assert {path.name for path in demo_model_path().iterdir()} == FILES
    config = model.config
    assert config.model_type == "llama"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert config.num_attention_heads > config.num_key_value_heads >= 4
    total = sum(p.numel() for p in model.parameters())
    assert total <= 3_000_000
    assert sum(p.numel() for n, p in model.named_parameters() if "_proj" in n) > 0.8 * total


def test_tokenizer_is_lossless_and_fits_the_model(tokenizer, model):
    text = demo_text("test")
    ids = tokenizer(text)["input_ids"]
    assert 20_000 < len(ids) < 45_000
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.bos_token_id not in ids
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert max(ids) < model.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer("naïve 語")["input_ids"], skip_special_tokens=True) == "naïve 語"


def test_model_predicts_held_out_text_from_what_was_said_before(tokenizer, model):
    """Far better than the best unigram model of this very text, and worse after another story's beginning."""
    windows = torch.tensor(tokenizer(demo_text("test"))["input_ids"][: 40 * 128]).view(40, 128)

    def nats(ids: torch.Tensor, start: int) -> float:
        with torch.no_grad():
            logits = model.float()(input_ids=ids, use_cache=False).logits[:, start:-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, start + 1 :].flatten()).item()

    counts = Counter(windows[:, 1:].flatten().tolist())
    total = sum(counts.values())
    unigram = -sum(n / total * math.log(n / total) for n in counts.values())
    assert math.exp(nats(windows, 0)) < 0.1 * math.exp(unigram)
    foreign = torch.cat([windows.roll(1, dims=0)[:, :96], windows[:, 96:]], dim=1)
    assert nats(foreign, 100) > nats(windows, 100) + 0.15


@pytest.mark.slow
def test_the_training_script_makes_a_folder_like_the_shipped_one(tokenizer, tmp_path):
    trained = train_tokenizer(demo_text("train"))
    assert trained.get_vocab() == tokenizer.get_vocab()
    windows = token_windows(trained, "\n\n".join(demo_text("validation").split("\n\n")[:20]), 64).flatten().tolist()
    assert windows[0] == trained.bos_token_id
    assert windows.count(trained.bos_token_id) == 3  # 20 stories, eight to a document

    perplexity = train(
        tmp_path, max_steps=2, num_stories=40, batch_size=2, learning_rate=1e-3, weight_decay=0.1, seed=0
    )
    assert math.isfinite(perplexity)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path, demo_model_path())]
    for config in configs:
        config.pop("transformers_version")
    assert configs[0] == configs[1]
    AutoModelForCausalLM.from_pretrained(tmp_path)
