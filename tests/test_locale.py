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
    "C": {"LC_ALL": "C"},
    "ASCII output": {"PYTHONIOENCODING": "ascii"},
    "C without Python's help": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def run(folder: Path, environment: str, *options: str) -> subprocess.CompletedProcess[bytes]:
    arguments = ["fit", "--config", str(ROOT / "configs" / "wanda.yaml"), *options]
    arguments += ["--trainer.default_root_dir", str(folder / "lögs"), "--trainer.accelerator", "cpu"]
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))
    }
    return subprocess.run(
        [sys.executable, "-m", "lightning_prune", *arguments],
        env=variables | ENVIRONMENTS[environment] | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    base = save_base(make_tiny(), tmp_path / "modèle")
    array = tmp_path / "données.npy"
    np.save(array, tiny_tokens(6, 16).numpy())
    return ["--model.pretrained", base, "--data.dataset", str(array), "--data.eval_datasets", f"[{array}]"]


@pytest.mark.slow
@pytest.mark.parametrize("environment", ["C", "ASCII output"])
def test_names_that_are_not_ascii(tmp_path: Path, inputs: list[str], environment: str) -> None:
    done = run(tmp_path, environment, *inputs)
    assert done.returncode == 0, done.stderr[-2000:]
    assert b"pruned model: " in done.stdout
    (metrics,) = (tmp_path / "lögs").rglob("metrics.json")
    assert '"données.npy"' in metrics.read_text(encoding="utf-8")


@pytest.mark.slow
def test_where_such_names_cannot_be_told_the_message_says_how(tmp_path: Path, inputs: list[str]) -> None:
    done = run(tmp_path, "C without Python's help", *inputs)
    assert done.returncode == 2
    assert b"PYTHONUTF8=1" in done.stderr
    assert b"Traceback" not in done.stderr
    (tmp_path / "c.yaml").write_text("model:\n  init_args:\n    label: système\n", encoding="utf-8")
    done = run(tmp_path, "C without Python's help", "--config", str(tmp_path / "c.yaml"))
    assert done.returncode == 2
    assert b"PYTHONUTF8=1" in done.stderr
    assert not list(tmp_path.glob("l*gs"))
