"""The embedded default: a tiny trained GQA Llama, its tokenizer and its text. Works without a network.

``tools/demo/`` of the repository says how they were made.
"""

import gzip
from pathlib import Path

from lightning_prune.support.errors import UserError

SPLITS = ("train", "validation", "test")
_HERE = Path(__file__).resolve().parent


def demo_model_path() -> Path:
    """The Hugging Face folder of the demo model (a Llama of 1.16 M parameters in bf16)."""
    return _HERE / "model"


def demo_text(split: str) -> str:
    """Made-up stories, one paragraph each: 4000 for train, 200 for the others; no story is in two splits.

    Raises:
        UserError: ``split`` is not train, validation or test.
    """
    if split not in SPLITS:
        raise UserError(f"The demo text has no split {split!r}. Set split to one of {', '.join(SPLITS)}.")
    return gzip.decompress((_HERE / "text" / f"{split}.txt.gz").read_bytes()).decode("utf-8")
