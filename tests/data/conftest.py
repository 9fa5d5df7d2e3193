import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_prune.data.datamodule import CalibrationDataModule

TEXT = "the cat sat on a mat while rain fell over old town nobody came for it"
WORDS = TEXT.split()


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


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A table in the kind of file that the name says, without an ending a folder saved by `datasets`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    contents = {".jsonl": lines, ".json": json.dumps(rows, indent=1).encode(), ".gz": gzip.compress(lines)}
    if path.suffix in contents:
        path.write_bytes(contents[path.suffix])
        return path
    if path.suffix == ".csv":  # as most tools write a list there
        rows = [{key: json.dumps(one) if isinstance(one, list) else one for key, one in row.items()} for row in rows]
    table = datasets.Dataset.from_list(rows)
    {".parquet": table.to_parquet, ".csv": table.to_csv, "": table.save_to_disk}[path.suffix](path)
    return path


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
def build(tokenizer_folder: str, text_file: str, tmp_path: Path) -> Any:
    """``build(dataset, kind, **options)``: a data module on 11 windows of 16 tokens; its sets are not opened."""
    small = {"num_samples": 11, "seq_len": 16, "eval_datasets": []}
    small |= {"tokenizer": tokenizer_folder, "cache_dir": str(tmp_path / "cache")}

    def make(dataset: Any = text_file, kind: Any = CalibrationDataModule, **options: Any) -> Any:
        evaluated = {"eval_seq_len": 16} if kind is CalibrationDataModule else {}
        return kind(dataset, **small | evaluated | options)

    return make


@pytest.fixture
def set_up(build: Any) -> Any:
    """As ``build``, with its sets opened."""

    def make(*given: Any, **options: Any) -> Any:
        data = build(*given, **options)
        data.setup("fit")
        return data

    return make
