"""The embedded default: a tiny trained GQA Llama, its tokenizer and its text. Works without a network."""

from __future__ import annotations

from pathlib import Path

from lightning_prune.demo.text import demo_text

__all__ = ["demo_model_path", "demo_text"]


def demo_model_path() -> Path:
    """The Hugging Face folder of the demo model (a Llama of 1.16 M parameters in bf16)."""
    return Path(__file__).resolve().parent / "model"
