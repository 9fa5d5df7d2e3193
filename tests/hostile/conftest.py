"""The bench on which hostile command lines run."""

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

import lightning_prune.comparison.report
import lightning_prune.evaluation.efficiency
import lightning_prune.runs.experiment  # noqa: F401  the imports take seconds and belong to no case
from lightning_prune.cli import main
from tests.hostile.harness import LIMIT, Bench
from tests.tiny import make_tiny, tiny_tokens


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(LIMIT, func_only=True))  # shared runs are no case's


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


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, hostile_model: Path, hostile_tokens: Path) -> Path:
    """Finished runs of one model, ``run`` and ``other``, and a ``report`` on them, which no case may change."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "compare.yaml").write_text("systems: {a: wanda}\nratios: [0.3, 0.4]\n")
    words = ["compare", "--config", f"{folder}/compare.yaml", "--root", f"{folder}/root"]
    words += ["--output", f"{folder}/report", "--model", str(hostile_model), "--trainer.accelerator", "cpu"]
    words += ["--data.dataset", str(hostile_tokens), "--data.eval_datasets", f"[{hostile_tokens}]"]
    words += ["--trainer.logger", "false"]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        assert main(words) == 0
    for number, name in enumerate(("run", "other")):
        (folder / f"root/a/version_{number}").rename(folder / name)
    return folder


@pytest.fixture
def bench(hostile_model: Path, hostile_tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    """A folder of its own for every case."""
    return Bench(hostile_model, hostile_tokens, tmp_path, capsys)
