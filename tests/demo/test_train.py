"""The training script makes what the package ships."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_prune.demo import demo_model_path, demo_text
from lightning_prune.demo.train import token_windows, train, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(demo_text("train"))


def test_tokenizer_is_the_shipped_one(tokenizer):
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(demo_model_path()).get_vocab()


def test_windows_keep_every_story_between_its_document_marks(tokenizer):
    text = demo_text("validation", 20)
    windows = token_windows(tokenizer, text, 64)
    flat = windows.flatten().tolist()
    assert windows.shape[1] == 64
    assert flat[0] == tokenizer.bos_token_id
    assert flat.count(tokenizer.bos_token_id) == 3  # 20 stories, eight to a document
    decoded = tokenizer.decode(flat, skip_special_tokens=True)
    assert decoded[:500] == text[:500]


def test_few_steps_write_a_folder_like_the_shipped_one(tmp_path):
    perplexity = train(
        tmp_path, max_steps=2, num_stories=40, batch_size=2, learning_rate=1e-3, weight_decay=0.1, seed=0
    )
    assert math.isfinite(perplexity)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in demo_model_path().iterdir()}
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path, demo_model_path())]
    for config in configs:
        config.pop("transformers_version")
    assert configs[0] == configs[1]
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.slow
def test_help_teaches_every_option():
    result = subprocess.run(
        [sys.executable, "-m", "lightning_prune.demo.train", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
    )
    for option in ("--output", "--max-steps", "--seed", "--learning-rate", "default"):
        assert option in result.stdout
