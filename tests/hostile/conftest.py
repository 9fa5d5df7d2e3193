"""The bench on which hostile command lines run."""

import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

import lightning_prune.comparison.report
import lightning_prune.evaluation.efficiency
import lightning_prune.runs.experiment  # noqa: F401  the imports take seconds and belong to no case
from lightning_prune.cli import main
from tests.formats.checkpoints import save
from tests.hostile.harness import LIMIT, Bench, Case
from tests.tiny import make_tiny, mixed_plan, tiny_tokenizer, tiny_tokens


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(LIMIT, func_only=True))  # the stock is no case's


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What cases begin with, and none may change: a tiny Llama of four layers, ``model``, the same with a tokenizer of
    the words w0 … w95, ``reader``, a token array, two finished runs, ``run`` and ``other``, a ``report`` on them, and a
    ``pruned`` checkpoint of another model with the tokenizer of the demo."""
    folder = tmp_path_factory.mktemp("stock")
    make_tiny().save_pretrained(folder / "model")
    shutil.copytree(folder / "model", folder / "reader")
    tiny_tokenizer().save_pretrained(folder / "reader")
    np.save(folder / "tokens.npy", tiny_tokens(6, 16).numpy())
    (folder / "compare.yaml").write_text("systems: {a: wanda}\nratios: [0.3, 0.4]\n")
    words = ["compare", "--config", f"{folder}/compare.yaml", "--root", f"{folder}/root"]
    words += ["--output", f"{folder}/report", "--model", f"{folder}/model", "--trainer.accelerator", "cpu"]
    words += ["--data.dataset", f"{folder}/tokens.npy", "--data.eval_datasets", f"[{folder}/tokens.npy]"]
    words += ["--trainer.logger", "false", "--data.continuations", "0"]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        assert main(words) == 0
        save(folder / "pruned", plan=mixed_plan)
    for number, name in enumerate(("run", "other")):
        (folder / f"root/a/version_{number}").rename(folder / name)
    return folder


@pytest.fixture
def bench(
    stock: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    """A folder of its own for every case, with copies of what it needs; it is the working folder."""
    made = Bench(stock, tmp_path, capsys)
    monkeypatch.chdir(made.inputs)
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    for name in case.needs.split() if isinstance(case, Case) else ():
        shutil.copytree(stock / name, made.inputs / name)
    return made
