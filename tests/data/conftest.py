from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_prune.data.datamodule import CalibrationDataModule

TEXT = "the cat sat on a mat while rain fell over old town nobody came for it"
WORDS = TEXT.split()


def explode(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("must not be called")


def make_text(words: int, shift: int = 0) -> str:
    """Lines of 11 words, paragraphs of 4 lines; not periodic, so that no two windows are alike."""
    state, lines, line = 12345 + shift, [], []
    for number in range(words):
        state = (1103515245 * state + 12345) % 2**31
        line.append(WORDS[state // 65536 % len(WORDS)])
        if number % 11 == 10:
            lines.append(" ".join(line) + ("\n" if number % 44 == 43 else ""))
            line = []
    return "\n".join([*lines, " ".join(line)])


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE with 300 ids, saved like a model folder's tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([make_text(2000)], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text(make_text(3000), encoding="utf-8")
    return str(path)


@pytest.fixture
def set_up(tokenizer_folder: str, text_file: str, tmp_path: Path) -> Any:
    """``set_up(dataset, kind, **options)``: a data module on 11 windows of 16 tokens, its sets opened."""

    def make(dataset: Any = text_file, kind: Any = CalibrationDataModule, **options: Any) -> Any:
        small = {"num_samples": 11, "seq_len": 16, "eval_datasets": [], "tokenizer": tokenizer_folder}
        data = kind(dataset, **{**small, "cache_dir": str(tmp_path / "cache"), **options})
        data.setup("fit")
        return data

    return make
