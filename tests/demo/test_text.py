"""The demo text: the same everywhere, held out between splits, and English enough to prune on."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter

import pytest

from lightning_prune.demo import demo_text
from lightning_prune.demo.grammar import RULES, STORIES
from lightning_prune.support.errors import UserError


def test_text_is_the_one_the_shipped_model_was_trained_on():
    """Frozen on purpose: whoever changes the text must train the model anew and then this digest."""
    digest = hashlib.sha256(demo_text("train").encode()).hexdigest()
    assert digest == "36eaf983cf308c488a1758ee49ce5b14e5d970a6ffe440b3f566bf4c10a874f8"


def test_text_does_not_depend_on_the_process_hash_seed():
    program = "from lightning_prune.demo import demo_text; print(demo_text('test', 20), end='')"
    texts = [
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    ]
    assert texts[0] == texts[1] == demo_text("test", 20)


def test_text_needs_no_torch():
    program = "import sys, lightning_prune.demo; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_splits_share_no_story():
    stories = [set(demo_text(split).strip().split("\n\n")) for split in ("train", "validation", "test")]
    assert [len(one) for one in stories] == [4000, 200, 200]
    assert len(set.union(*stories)) == 4400


def test_longer_text_begins_with_the_shorter_one():
    assert demo_text("train", 30).startswith(demo_text("train", 10).rstrip("\n"))


def test_every_rule_can_be_told_and_no_slot_is_left_open():
    text = demo_text("train")
    assert text.isascii()
    assert not set("{}~") & set(text)
    used = {rule for story in STORIES for rule, _, _ in story}
    assert used <= set(RULES)


def test_words_are_spread_as_in_english():
    """Zipf: forty words make up much of the text, the rarer half of the vocabulary little of it."""
    counts = Counter(demo_text("train").lower().replace(".", " ").replace(",", " ").split())
    frequencies = sorted(counts.values(), reverse=True)
    total = sum(frequencies)
    assert 1000 < len(counts) < 5000
    assert 0.04 < counts["the"] / total < 0.12
    assert sum(frequencies[:40]) > 0.35 * total
    assert sum(frequencies[len(frequencies) // 2 :]) < 0.1 * total


def test_sums_in_the_text_are_right():
    """The arithmetic can be learned: what is left is the difference."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    values = {word: n for n, word in enumerate(words)}
    seen = 0
    for sentence in demo_text("train", 1000).split(". "):
        if "so " in sentence and sentence.endswith("were left") and " had " in sentence:
            had = sentence.split(" had ")[1].split()[0]
            gave = sentence.split(" gave ")[1].split()[0]
            rest = sentence.split("so ")[-1].split()[0]
            if had in values:
                assert values[had] - values[gave] == values[rest]
                seen += 1
    assert seen > 20


@pytest.mark.parametrize(("split", "num_stories"), [("dev", None), ("test", 0), ("train", -3)])
def test_wrong_request_names_what_to_change(split, num_stories):
    with pytest.raises(UserError, match="split" if num_stories is None else "num_stories"):
        demo_text(split, num_stories)
