"""What a run says: ``--quiet`` and ``--json``, progress, warnings, the last line."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_prune.cli import main
from lightning_prune.support import progress
from lightning_prune.support.progress import Lines, Status
from tests.methods.running import save_base
from tests.tiny import make_tiny, tiny_tokens

Run = Callable[..., tuple[str, str]]


@pytest.fixture(autouse=True)
def warnings_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        print(warnings.formatwarning(message, category, "file", 1), end="", file=sys.stderr)

    monkeypatch.setattr(warnings, "showwarning", show)  # pytest keeps warnings for itself,
    warnings.filterwarnings("default")  # and puts back its filters after each test


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command on a tiny model without a tokenizer, evaluated ``on`` an array; returns stdout and stderr."""
    for seed, name in enumerate(("tokens", "other")):
        np.save(tmp_path / f"{name}.npy", tiny_tokens(8, 16, seed).numpy())
    options = ["--model.pretrained", save_base(make_tiny(layers=2), tmp_path / "base")]
    options += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", f"{tmp_path}/logs"]
    options += ["--data.dataset", f"{tmp_path}/tokens.npy"]

    def call(command: str, *words: str, on: str = "other.npy") -> tuple[str, str]:
        capsys.readouterr()
        evaluated = ["--data.eval_datasets", f"[{tmp_path}/{on}]"] if on else []
        assert main([*command.split(), *options, *evaluated, *words]) == 0
        return capsys.readouterr()

    return call


def phases(err: str) -> list[str]:
    return [line.partition(":")[0] for line in err.splitlines()]


def test_json_is_all_that_is_on_stdout(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = json.loads(run("fit --method wanda --json")[0])
    stored = json.loads((Path(fitted["folder"]) / "metrics.json").read_text())
    assert stored == {name: value for name, value in fitted.items() if name != "folder"}
    assert main(["decide", "--run", fitted["folder"], "--model.pruning_ratio", "0.3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pruning_ratio"]["requested"] == 0.3
    assert "other.npy" in json.loads(run("test --json")[0])["perplexity"]


def test_quiet_prints_the_last_line_alone_and_a_method_without_calibration_opens_no_dataset(
    run: Run, tmp_path: Path
) -> None:
    out, err = run("fit --method magnitude --quiet", "--data.dataset", "nowhere.npy")
    assert out == f"pruned model: {tmp_path / 'logs' / 'magnitude' / 'version_0' / 'pruned'}\n"
    assert err == ""


def test_last_line_is_where_the_pruned_model_is_and_the_table_names_the_protocol(run: Run, tmp_path: Path) -> None:
    out, err = run("fit --method wanda")
    assert out.splitlines()[-1] == f"pruned model: {tmp_path}/logs/wanda/version_0/pruned"
    assert "perplexity other.npy" in out
    assert "tokens in windows of 16)" in out
    for noise in ("arning", "tip", "GPU available", "configure_optimizers", "num_workers", "LeafSpec"):
        assert noise not in out + err, noise  # nothing that no user can act on
    out, err = run("test")
    assert "tokens in windows of 16)" in out
    assert phases(err) == ["perplexity"]  # without a guess at the kind of the model


@pytest.mark.parametrize(
    ("on", "says"), [("", "No evaluation: "), ("tokens.npy", "is the text the model was calibrated on")]
)
def test_what_is_not_measured_on_held_out_text_is_said_once(run: Run, on: str, says: str) -> None:
    out, err = run("fit --method wanda", on=on)
    (about,) = [line for line in err.splitlines() if says in line]
    assert about.startswith("warning: ")
    assert "--data.eval_datasets" in about
    assert ("perplexity" in out) == bool(on)


@pytest.mark.parametrize(
    ("option", "lines"),
    [
        ("", ["tokenising", "calibrating", "writing the pruned model"]),
        ("--quiet", []),
        ("--trainer.enable_progress_bar false", []),
    ],
)
def test_off_a_terminal_every_phase_leaves_a_line_unless_silenced(
    option: str, lines: list[str], run: Run, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("the old house stands on the hill . " * 400)  # in no cache yet
    words = ["--model.pretrained", "demo", "--data.dataset", f"{tmp_path}/text.txt", "--data.eval_datasets", "[]"]
    words += ["--data.num_samples", "4", "--data.cache_dir", f"{tmp_path}/cache"]
    assert phases(run(f"fit --method wanda {option}", *words)[1]) == lines


def test_all_phases_are_known_from_the_first_one_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run would look finished when its first phase is."""
    seen: list[Status] = []

    class Recorded(Lines):
        def moved(self, status: Status) -> None:
            seen.append(status)

    monkeypatch.setattr(progress, "display_for", Recorded)
    run("fit --method wanda")
    assert {status.phases for status in seen} == {4}
    dense = [status.fraction for status in seen if status.phase == "perplexity of the dense model"]
    assert max(dense) < 0.9
    assert seen[-1].phase == "perplexity of the pruned model"
    assert seen[-1].fraction == pytest.approx(1, abs=0.2)  # what is pruned is a little less work than expected
    places = {status.at for status in seen if status.phase == "calibrating"}
    assert places == {"importance, layer 1 of 2", "importance, layer 2 of 2"}
