"""What a run says: ``--quiet`` and ``--json``, progress, warnings, the last line."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_prune.cli import main
from lightning_prune.support import progress
from lightning_prune.support.progress import Lines, Status
from tests.methods.running import save_base
from tests.tiny import make_tiny, tiny_tokens


@pytest.fixture(autouse=True)
def warnings_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        print(warnings.formatwarning(message, category, "file", 1), end="", file=sys.stderr)

    monkeypatch.setattr(warnings, "showwarning", show)  # pytest keeps warnings for itself,
    warnings.filterwarnings("default")  # and puts back its filters after each test


@pytest.fixture
def place(tmp_path: Path) -> list[str]:
    return ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "logs")]


@pytest.fixture
def words(tmp_path: Path, place: list[str], capsys: pytest.CaptureFixture) -> list[str]:
    """Options of a run on a tiny model without a tokenizer."""
    for seed, name in enumerate(("tokens", "other")):
        np.save(tmp_path / f"{name}.npy", tiny_tokens(8, 16, seed).numpy())
    base = save_base(make_tiny(layers=2), tmp_path / "base")
    capsys.readouterr()  # what saving the model printed
    return ["--model.pretrained", base, *place]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    return ["--data.dataset", f"{tmp_path}/tokens.npy", "--data.eval_datasets", f"[{tmp_path}/other.npy]"]


@pytest.fixture
def text(tmp_path: Path, place: list[str]) -> list[str]:
    """The demo model on a text that is in no cache yet."""
    (tmp_path / "text.txt").write_text("the old house stands on the hill . " * 400)
    options = ["--data.dataset", str(tmp_path / "text.txt"), "--data.eval_datasets", "[]", "--data.num_samples", "4"]
    return [*options, "--data.cache_dir", str(tmp_path / "cache"), *place]


def phases(err: str) -> list[str]:
    return [line.partition(":")[0] for line in err.splitlines()]


def test_json_is_all_that_is_on_stdout(words: list[str], data: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", "--method", "wanda", *words, *data, "--json"]) == 0
    fitted = json.loads(capsys.readouterr().out)
    stored = json.loads((Path(fitted["folder"]) / "metrics.json").read_text())
    assert stored == {name: value for name, value in fitted.items() if name != "folder"}
    assert main(["decide", "--run", fitted["folder"], "--model.pruning_ratio", "0.3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pruning_ratio"]["requested"] == 0.3
    assert main(["test", *words, *data, "--json"]) == 0
    assert "other.npy" in json.loads(capsys.readouterr().out)["perplexity"]


def test_quiet_prints_the_last_line_alone_and_a_method_without_calibration_opens_no_dataset(
    words: list[str], data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["fit", "--method", "magnitude", *words, *data, "--data.dataset", "nowhere.npy", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"pruned model: {tmp_path / 'logs' / 'magnitude' / 'version_0' / 'pruned'}\n"
    assert shown.err == ""


def test_last_line_is_where_the_pruned_model_is_and_the_table_names_the_protocol(
    words: list[str], data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["fit", "--method", "wanda", *words, *data]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"pruned model: {tmp_path}/logs/wanda/version_0/pruned"
    assert "perplexity other.npy" in out
    assert "tokens in windows of 16)" in out
    for noise in ("arning", "tip", "GPU available", "configure_optimizers", "num_workers", "LeafSpec"):
        assert noise not in out + err, noise  # nothing that no user can act on
    assert main(["test", *words, *data]) == 0
    shown = capsys.readouterr()
    assert "tokens in windows of 16)" in shown.out
    assert phases(shown.err) == ["perplexity"]  # without a guess at the kind of the model


def test_what_is_not_measured_on_held_out_text_is_said_once(
    words: list[str], data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    the_same = ["--data.eval_datasets", f"[{tmp_path}/tokens.npy]"]
    for given, says in (([], "no evaluation: "), (the_same, "is the text the model was calibrated on")):
        assert main(["fit", "--method", "wanda", *words, *data[:2], *given]) == 0
        shown = capsys.readouterr()
        (about,) = [line for line in shown.err.splitlines() if says in line]
        assert about.startswith("warning: ")
        assert "--data.eval_datasets" in about
        assert ("perplexity" in shown.out) == bool(given)


@pytest.mark.parametrize(
    ("option", "lines"),
    [
        ([], ["tokenising", "calibrating", "writing the pruned model"]),
        (["--quiet"], []),
        (["--trainer.enable_progress_bar", "false"], []),
    ],
)
def test_off_a_terminal_every_phase_leaves_a_line_unless_silenced(
    option: list[str], lines: list[str], text: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main(["fit", "--method", "wanda", *text, *option]) == 0
    assert phases(capsys.readouterr().err) == lines


def test_all_phases_are_known_from_the_first_one_on(
    words: list[str], data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run would look finished when its first phase is."""
    seen: list[Status] = []

    class Recorded(Lines):
        def moved(self, status: Status) -> None:
            seen.append(status)

    monkeypatch.setattr(progress, "display_for", Recorded)
    assert main(["fit", "--method", "wanda", *words, *data]) == 0
    assert {status.phases for status in seen} == {4}
    dense = [status.fraction for status in seen if status.phase == "perplexity of the dense model"]
    assert max(dense) < 0.9
    assert seen[-1].phase == "perplexity of the pruned model"
    assert seen[-1].fraction == pytest.approx(1, abs=0.2)  # what is pruned is a little less work than expected
    places = {status.at for status in seen if status.phase == "calibrating"}
    assert places == {"importance, layer 1 of 2", "importance, layer 2 of 2"}
