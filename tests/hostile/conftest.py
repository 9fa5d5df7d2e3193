"""The bench on which hostile command lines run."""

from pathlib import Path

import numpy as np
import pytest

import lightning_prune.comparison.report
import lightning_prune.evaluation.efficiency
import lightning_prune.runs.experiment  # noqa: F401  the imports take seconds and belong to no case
from tests.hostile.harness import LIMIT, Bench
from tests.tiny import make_tiny, tiny_tokens


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(LIMIT))


@pytest.fixture(scope="session")
def hostile_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of four layers, which no case may change."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    make_tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hostile_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token array ``[6, 16]`` that fits the model."""
    file = tmp_path_factory.mktemp("hostile") / "tokens.npy"
    np.save(file, tiny_tokens(6, 16).numpy())
    return file


@pytest.fixture
def bench(hostile_model: Path, hostile_tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    """A folder of its own for every case."""
    return Bench(hostile_model, hostile_tokens, tmp_path, capsys)
