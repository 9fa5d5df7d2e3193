"""``--quiet`` and ``--json`` of the commands that make runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_prune.cli import main
from tests.methods.running import save_base
from tests.tiny import make_tiny, tiny_tokens


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    base = save_base(make_tiny(layers=2), tmp_path / "base")
    np.save(tmp_path / "tokens.npy", tiny_tokens(8, 16).numpy())
    tokens = str(tmp_path / "tokens.npy")
    return [
        *("--model.pretrained", base, "--data.eval_datasets", json.dumps([tokens])),
        *("--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "logs")),
    ]


def test_json_is_all_that_stands_on_stdout(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = ["--data.dataset", str(tmp_path / "tokens.npy")]
    assert main(["fit", "--method", "wanda", *words, *dataset, "--json"]) == 0
    fitted = json.loads(capsys.readouterr().out)
    stored = json.loads((Path(fitted["folder"]) / "metrics.json").read_text())
    assert stored == {name: value for name, value in fitted.items() if name != "folder"}
    assert main(["decide", "--run", fitted["folder"], "--model.pruning_ratio", "0.3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pruning_ratio"]["requested"] == 0.3
    assert main(["test", *words, "--json"]) == 0
    assert "tokens.npy" in json.loads(capsys.readouterr().out)["perplexity"]


def test_quiet_prints_where_the_result_is_and_nothing_else(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["fit", "--method", "magnitude", *words, "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"pruned model: {tmp_path / 'logs' / 'magnitude' / 'version_0' / 'pruned'}\n"
    assert "%" not in shown.err


def test_the_table_names_the_protocol_beside_the_perplexity(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", "--method", "magnitude", *words]) == 0
    assert "tokens in windows of 16)" in capsys.readouterr().out
    assert main(["test", *words]) == 0
    assert "tokens in windows of 16)" in capsys.readouterr().out
