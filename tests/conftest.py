"""Fixtures every folder uses. The factories themselves are plain functions in ``tests/tiny.py``."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from transformers import PreTrainedModel

from tests.killing import Forks
from tests.tiny import make_tiny

torch.set_num_threads(1)

# Files that take longest begin first, so that neither worker waits for the other with one of them at the end.
LONGEST = (
    *("test_docs.py", "test_life.py", "test_resume.py", "test_every_method.py", "test_trainer.py"),
    *("test_experiment.py", "test_expert_families.py", "test_family_check.py", "test_notebook.py"),
)
# One family of every kind of layer: plain, fused projections, norms on both sides, whole attention, experts.
QUICK_FAMILIES = ("llama", "phi3", "gemma2", "olmo2", "glm4_moe")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every other family, and the tables of hostile input, are slow: they are the same test many times over. So is the
    simulated accelerator, which is compiled first."""
    for item in items:
        if item.get_closest_marker("families"):
            continue
        options = item.callspec.params if hasattr(item, "callspec") else {}
        if {"hostile", "accelerator"} & {*item.path.parts} or options.get("family", "llama") not in QUICK_FAMILIES:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """All modules are imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """Lightning remembers a process's rank in a global; a test that plays rank 1 must not silence those behind it."""
    before = getattr(rank_zero_only, "rank", None)
    yield
    if before is not None:
        rank_zero_only.rank = before
    elif hasattr(rank_zero_only, "rank"):
        del rank_zero_only.rank


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """A process that has imported everything; runs that are killed, or made at once, are forks of it."""
    found = Forks()
    yield found
    found.close()


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(family="llama", heads=4, kv_heads=2, tied=True, layers=4, seed=0)``."""
    return make_tiny


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """As ``tiny_model``, saved as a Hugging Face folder without a tokenizer."""

    def save(**options: Any) -> Path:
        folder = tmp_path / f"tiny-{len(list(tmp_path.iterdir()))}"
        make_tiny(**options).save_pretrained(folder)
        return folder

    return save
