"""One way to prune a model in memory."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from lightning_prune.methods import base, flap
from tests.methods.running import run_method, save_base
from tests.tiny import tiny_tokens


@pytest.fixture
def trusted_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs do not try their family first, which takes as long as the run: ``tests/checkpoint/test_family_check.py``
    tries every family, and ``test_families.py`` sees to it that one that fails is refused."""
    for module in (base, flap):
        monkeypatch.setattr(module, "check_family", lambda config: None)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    """``run(model, Wanda, 0.2, batch_size=3, round_to=8)`` is the finished method, in a run folder of its own."""
    number = itertools.count()

    def prune(
        model: PreTrainedModel,
        make: Callable[..., Any],
        ratio: float = 0.2,
        tokens: Tensor | None = None,
        batch_size: int = 4,
        precision: str = "32-true",
        **options: Any,
    ) -> Any:
        folder = tmp_path / f"run-{next(number)}"
        method = make(save_base(model, folder / "base"), ratio, **options)
        return run_method(method, tiny_tokens(7, 12) if tokens is None else tokens, folder, batch_size, precision)

    return prune
