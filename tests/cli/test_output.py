"""``--quiet`` and ``--json`` of the commands that make runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_prune.cli import main
from lightning_prune.support import progress
from lightning_prune.support.progress import Lines, Status
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
    assert shown.err == ""


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    """The demo model on a text that is in no cache yet."""
    (tmp_path / "text.txt").write_text("the old house stands on the hill . " * 400)
    return [
        *("--data.dataset", str(tmp_path / "text.txt"), "--data.eval_datasets", "[]"),
        *("--data.num_samples", "4", "--data.cache_dir", str(tmp_path / "cache")),
        *("--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "logs")),
    ]


def phases(err: str) -> list[str]:
    return [line.partition(":")[0] for line in err.splitlines()]


def test_off_a_terminal_every_phase_leaves_a_line(text: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", "--method", "wanda", *text]) == 0
    assert phases(capsys.readouterr().err) == ["tokenising", "calibrating", "writing the pruned model"]


@pytest.mark.parametrize("option", [["--quiet"], ["--trainer.enable_progress_bar", "false"]])
def test_progress_is_silenced_from_the_first_text_on(
    option: list[str], text: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main(["fit", "--method", "wanda", *text, *option]) == 0
    assert capsys.readouterr().err == ""


def test_all_phases_are_known_from_the_first_one_on(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run would look finished when its first phase is."""
    seen: list[Status] = []

    class Recorded(Lines):
        def moved(self, status: Status) -> None:
            seen.append(status)

    monkeypatch.setattr(progress, "display_for", Recorded)
    tokens = words[words.index("--data.eval_datasets") + 1].strip('[]"')
    assert main(["fit", "--method", "wanda", *words, "--data.dataset", tokens]) == 0
    assert {status.phases for status in seen} == {4}
    dense = [status.fraction for status in seen if status.phase == "perplexity of the dense model"]
    assert max(dense) < 0.9
    assert seen[-1].phase == "perplexity of the pruned model"
    assert seen[-1].fraction == pytest.approx(1, abs=0.2)  # what is pruned is a little less work than expected
    places = {status.at for status in seen if status.phase == "calibrating"}
    assert places == {"importance, layer 1 of 2", "importance, layer 2 of 2"}


def test_a_model_of_any_kind_is_measured_without_a_guess_at_its_kind(
    words: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main(["test", *words]) == 0
    assert phases(capsys.readouterr().err) == ["perplexity"]


def test_the_table_names_the_protocol_beside_the_perplexity(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", "--method", "magnitude", *words]) == 0
    assert "tokens in windows of 16)" in capsys.readouterr().out
    assert main(["test", *words]) == 0
    assert "tokens in windows of 16)" in capsys.readouterr().out
