"""Two processes calibrate on shares of the set and reach the decision that one process reaches."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.methods.running import save_base
from tests.tiny import make_tiny, tiny_tokens


@pytest.mark.slow
@pytest.mark.parametrize("config", ["hgsp_taylor", "slimgpt"])
def test_number_of_processes_does_not_change_the_plan(config: str, tmp_path: Path) -> None:
    base = save_base(make_tiny(layers=3), tmp_path / "base")
    np.save(tmp_path / "tokens.npy", tiny_tokens(11, 16).numpy())  # 11 does not divide by 2 processes × batch 2
    plans, weights, metrics = [], [], []
    for processes in (1, 2):
        root = tmp_path / str(processes)
        arguments = ["fit", "--config", f"configs/{config}.yaml", "--model.pretrained", base]
        arguments += ["--data.dataset", str(tmp_path / "tokens.npy"), "--data.batch_size", "2"]
        arguments += ["--data.eval_datasets", json.dumps([str(tmp_path / "tokens.npy")])]
        arguments += ["--trainer.accelerator", "cpu", "--trainer.devices", str(processes)]
        arguments += ["--trainer.default_root_dir", str(root)]
        command = [sys.executable, "-m", "lightning_prune", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        (folder,) = [path for path in root.glob("*/version_*") if (path / "plan.json").exists()]
        plans.append(json.loads((folder / "plan.json").read_text())["layers"])
        weights.append((folder / "pruned" / "model.safetensors").read_bytes())
        metrics.append(json.loads((folder / "metrics.json").read_text())["perplexity"]["tokens.npy"])
    assert plans[0] == plans[1]
    assert metrics[1]["tokens"] == metrics[0]["tokens"] == 11 * 15
    assert metrics[1]["dense"] == pytest.approx(metrics[0]["dense"], rel=1e-6)
    assert metrics[1]["pruned"] == pytest.approx(metrics[0]["pruned"], rel=1e-4)
    if config == "hgsp_taylor":
        assert weights[0] == weights[1]
