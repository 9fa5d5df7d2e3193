"""A terminal that is not UTF-8 neither ends a finished run nor misreads what it is told."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.methods.running import save_base
from tests.tiny import make_tiny, tiny_tokens

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = {
    "C, ASCII output": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    "C without Python's help": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


SEVERAL = "import sys; from lightning_prune.cli import main; print([main(one.split()) for one in sys.argv[1:]])"


def run(folder: Path, environment: str, *options: str) -> subprocess.CompletedProcess[bytes]:
    """``fit`` with each of ``options``, one after the other in one process, which prints the statuses at last."""
    base = f"fit --config {ROOT}/configs/wanda.yaml --trainer.default_root_dir {folder}/lögs --trainer.accelerator cpu"
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))
    }
    return subprocess.run(
        [sys.executable, "-c", SEVERAL, *(f"{base} {one}" for one in options)],
        env=variables | ENVIRONMENTS[environment] | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def inputs(tmp_path: Path) -> str:
    base = save_base(make_tiny(), tmp_path / "modèle")
    array = tmp_path / "données.npy"
    np.save(array, tiny_tokens(6, 16).numpy())
    return f"--model.pretrained {base} --data.dataset {array} --data.eval_datasets [{array}]"


@pytest.mark.slow
def test_names_that_are_not_ascii(tmp_path: Path, inputs: str) -> None:
    done = run(tmp_path, "C, ASCII output", inputs)
    assert done.stdout.endswith(b"[0]\n"), done.stderr[-2000:]
    assert b"pruned model: " in done.stdout
    (metrics,) = (tmp_path / "lögs").rglob("metrics.json")
    assert '"données.npy"' in metrics.read_text(encoding="utf-8")


@pytest.mark.slow
def test_where_such_names_cannot_be_told_the_message_says_how(tmp_path: Path, inputs: str) -> None:
    (tmp_path / "c.yaml").write_text("model:\n  init_args:\n    label: système\n", encoding="utf-8")
    done = run(tmp_path, "C without Python's help", inputs, f"--config {tmp_path}/c.yaml")
    assert done.stdout.endswith(b"[2, 2]\n"), done.stderr[-2000:]
    assert done.stderr.count(b"PYTHONUTF8=1") == 2
    assert b"Traceback" not in done.stderr
    assert not list(tmp_path.glob("l*gs"))
