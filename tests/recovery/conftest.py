"""One finished pruning run of a tiny model, shared by the folder's tests, and the command on top of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_prune.cli import main
from tests.tiny import make_tiny, tiny_tokens

CONFIGS = Path(__file__).parents[2] / "configs"


def prune(folder: Path, config: str = "wanda", *options: str) -> Path:
    """A finished run below ``folder``: its ``pruned`` folder."""
    make_tiny().save_pretrained(folder / "model")
    np.save(folder / "calibration.npy", tiny_tokens(8, 16, seed=1).numpy())
    np.save(folder / "evaluation.npy", tiny_tokens(8, 16, seed=2).numpy())
    np.save(folder / "training.npy", tiny_tokens(40, 16, seed=3).numpy())
    fixed = ["--model.pretrained", f"{folder}/model", "--trainer.default_root_dir", f"{folder}/logs"]
    fixed += ["--data.dataset", f"{folder}/calibration.npy", "--data.eval_datasets", f"[{folder}/evaluation.npy]"]
    fixed += ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--model.pruning_ratio", "0.3"]
    fixed += ["--data.continuations", "0"]
    assert main(["fit", "--config", str(CONFIGS / f"{config}.yaml"), *fixed, *options]) == 0
    return folder / "logs" / config / "version_0" / "pruned"


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of uneven widths, by a global ranking."""
    return prune(tmp_path_factory.mktemp("recovery"))


@pytest.fixture
def recover(tmp_path: Path) -> Callable[..., int]:
    """``recover(pruned, "--model.train", "all", …)``: the exit status; runs go below ``tmp_path/logs``."""

    def run(pruned: Path, *options: str, config: str = "recover_lora") -> int:
        fixed = ["--model.pretrained", str(pruned), "--trainer.default_root_dir", f"{tmp_path}/logs"]
        fixed += ["--trainer.accelerator", "cpu", "--data.dataset", f"{pruned.parents[3]}/training.npy"]
        fixed += ["--trainer.max_epochs", "2", "--data.batch_size", "8", "--trainer.logger", "false"]
        return main(["recover", "--config", config, *fixed, *options])

    return run
