"""What a run says and does beyond its files: evaluation that is skipped, warnings, the last line."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_prune.cli import main
from tests.tiny import make_tiny, tiny_tokens

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, str]]:
    """Runs the command on a tiny model without a tokenizer; returns what it wrote to stdout and stderr."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        print(warnings.formatwarning(message, category, "file", 1), end="", file=sys.stderr)

    monkeypatch.setattr(warnings, "showwarning", show)  # pytest keeps warnings for itself,
    warnings.filterwarnings("default")  # and puts back its filters after each test
    make_tiny().save_pretrained(tmp_path / "model")
    np.save(tmp_path / "tokens.npy", tiny_tokens(8, 16).numpy())
    np.save(tmp_path / "other.npy", tiny_tokens(8, 16, seed=1).numpy())

    def run(*options: str, config: str = "wanda.yaml") -> tuple[str, str]:
        fixed = ["--model.pretrained", f"{tmp_path}/model", "--trainer.default_root_dir", f"{tmp_path}/logs"]
        fixed += ["--data.dataset", f"{tmp_path}/tokens.npy", "--trainer.accelerator", "cpu"]
        capsys.readouterr()  # what saving the model printed
        assert main(["fit", "--config", str(CONFIGS / config), *fixed, *options]) == 0
        printed = capsys.readouterr()
        return printed.out, printed.err

    return run


def test_last_line_is_where_the_pruned_model_is(fit: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    out, _ = fit("--data.eval_datasets", f"[{tmp_path}/other.npy]")
    folder = tmp_path / "logs" / "wanda" / "version_0"
    assert out.splitlines()[-1] == f"pruned model: {folder}/pruned"
    assert (folder / "pruned" / "config.json").is_file()
    assert "perplexity other.npy" in out
    again, _ = fit("--data.eval_datasets", "[]")
    assert again.splitlines()[-1] == f"pruned model: {tmp_path}/logs/wanda/version_1/pruned"


def test_no_held_out_split_skips_evaluation_and_says_so_once(fit: Callable[..., tuple[str, str]]) -> None:
    out, err = fit()
    about = [line for line in err.splitlines() if "no evaluation" in line]
    assert len(about) == 1
    assert about[0].startswith("warning: no evaluation: ")
    assert "--data.eval_datasets" in about[0]
    assert "perplexity" not in out


def test_evaluating_on_the_calibration_tokens_warns(fit: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    _, err = fit("--data.eval_datasets", f"[{tmp_path}/tokens.npy]")
    about = [line for line in err.splitlines() if "is the text the model was calibrated on" in line]
    assert len(about) == 1


def test_method_without_calibration_never_opens_the_dataset(
    fit: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "tokens.npy").unlink()
    fit("--data.eval_datasets", f"[{tmp_path}/other.npy]", config="magnitude.yaml")
    assert (tmp_path / "logs" / "magnitude" / "version_0" / "metrics.json").is_file()


def test_nothing_that_no_user_can_act_on_is_printed(fit: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    """Lightning's tips, deprecations and the word 'warning' itself."""
    out, err = fit("--data.eval_datasets", f"[{tmp_path}/other.npy]")
    for noise in ("arning", "tip", "GPU available", "configure_optimizers", "num_workers", "LeafSpec"):
        assert noise not in out + err, noise
