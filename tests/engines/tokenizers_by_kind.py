"""Tokenizers of the kinds that published models have, trained on a few sentences."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lightning_prune.demo import demo_text
from lightning_prune.formats.vocabulary import SPLITS

SIZE = 900
TEXTS = [
    "Hello there, 1234567 people! It's Ann's; DON'T we'll  two  spaces\n\n and\tline   ends \r\n",
    "ünïcödé naïve — “quotes” 日本語のテキスト 🙂🙃 ١٢٣ ½ x²\u00a0y",
    "<s>already</s> said<|im_end|>\nand then <tool> more",
    "    def f(x):\n        return x ** 2  # comment\n",
    " leading",
    "",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_level(kind: str) -> Tokenizer:
    """GPT-2's kind with the splitting of ``gpt-2``, ``smollm``, ``llama-bpe``, ``qwen2`` or ``tekken``."""
    whole_words = dict(SPLITS.values()).get(kind, False)
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    if kind == "gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        pattern = next(pattern for pattern, (name, _) in SPLITS.items() if name == kind)
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([demo_text("validation"), *TEXTS * 5], trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama 2's kind: spaces are letters, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.pre_tokenizer = None
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=special, limit_alphabet=80, max_token_length=12, show_progress=False
    )
    lines = [line for line in demo_text("validation").splitlines() if line]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def save_tokenizer(kind: str, folder: Path) -> PreTrainedTokenizerFast:
    """Train the tokenizer ``kind`` and put it into a model folder in place of the one there; it adds a ``<s>``."""
    tokenizer = sentencepiece() if kind == "llama" else byte_level(kind)
    if kind == "llama":  # the bytes are tokens of the vocabulary, not added ones
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(content))
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    for file in folder.glob("tokenizer*"):
        file.unlink()
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if kind != "llama":  # llama.cpp and Hugging Face disagree on a space behind one that is not special
        found.add_tokens(["<tool>"])
    found.chat_template = TEMPLATE
    found.save_pretrained(folder)
    return found
