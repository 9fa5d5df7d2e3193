"""One run: what it records, what it leaves when it cannot go on, and that many at once do not meet."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.summary.writer.record_writer import RecordWriter

from lightning_prune.cli import main
from lightning_prune.comparison.costs import calibration, pruning
from lightning_prune.comparison.run import load_run
from lightning_prune.methods import Magnitude, ShortGPT, Wanda
from lightning_prune.runs.folder import RunFolder
from lightning_prune.support.errors import UserError
from tests.killing import Forks
from tests.methods.behaviour import prune, save_model, save_tokens
from tests.tiny import make_tiny, tiny_tokens


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    save_model(tmp_path / "model")
    save_tokens(tmp_path / "tokens.npy")
    save_tokens(tmp_path / "held_out.npy", tiny_tokens(6, 16, seed=5))
    return tmp_path


def options(inputs: Path, method: str = "Magnitude", root: str = "root") -> list[str]:
    return [
        f"--model={method}",
        f"--model.pretrained={inputs / 'model'}",
        f"--data.dataset={inputs / 'tokens.npy'}",
        f"--data.eval_datasets=[{inputs / 'held_out.npy'}]",
        f"--data.cache_dir={inputs / 'cache'}",
        f"--trainer.default_root_dir={inputs / root}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("logger", ["true", "false"])
def test_folder_is_claimed_with_and_without_a_logger(inputs: Path, logger: str) -> None:
    for number in range(2):
        assert main(["fit", *options(inputs), f"--trainer.logger={logger}"]) == 0
        run = RunFolder.open(inputs / "root" / "magnitude" / f"version_{number}", "--run")
        events = list(run.path.glob("20%/*tfevents*"))  # TensorBoard shows the path to them
        assert bool(events) == (logger == "true")
    assert entries(inputs / "root" / "magnitude") == ["version_0", "version_1"]
    assert not list((inputs / "root").rglob("unfinished"))


def test_what_was_run_is_on_disk_before_it_runs(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def decide(method: Magnitude) -> None:
        folder = inputs / "root" / "magnitude" / "version_0"
        seen.append(yaml.safe_load((folder / "config.yaml").read_text())["model"]["class_path"])
        seen.append((folder / "unfinished").is_file())
        raise UserError("that will do")

    monkeypatch.setattr(Magnitude, "decide", decide)
    assert main(["fit", *options(inputs)]) == 2
    assert seen == ["lightning_prune.methods.Magnitude", True]
    assert not (inputs / "root").exists()


@pytest.mark.parametrize("command", ["fit", "test"])
def test_full_disk_under_tensorboard_is_one_message(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    def write(self: RecordWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", write)
    arguments = options(inputs)
    assert main([command, *(arguments if command == "fit" else arguments[1:])]) == 2
    shown = capfd.readouterr().err
    assert "Traceback" not in shown
    assert shown.splitlines()[-1].startswith("error: --trainer.default_root_dir: cannot write below")
    assert not (inputs / "root").exists()


def test_label_that_is_no_name_writes_nothing(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line, and in the configuration of somebody else's run."""
    assert main(["fit", *options(inputs)]) == 0
    run = inputs / "root" / "magnitude" / "version_0"
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_args"]["label"] = "../../evil"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    before = sorted(inputs.rglob("*"))
    for line in (["decide", f"--run={run}"], ["fit", *options(inputs), "--model.label=../../evil"]):
        assert main(line) == 2
        assert "--model.label: found '../../evil'" in capsys.readouterr().err
        assert sorted(inputs.rglob("*")) == before


# Numbers


def test_decision_from_saved_scores_bears_what_measuring_them_cost(inputs: Path) -> None:
    assert main(["fit", *options(inputs, "Wanda")]) == 0
    first = load_run(inputs / "root" / "wanda" / "version_0")
    assert main(["decide", f"--run={first.folder}", "--model.pruning_ratio=0.3"]) == 0
    second = load_run(inputs / "root" / "wanda" / "version_1")
    assert main(["decide", f"--run={second.folder}", "--model.pruning_ratio=0.1"]) == 0
    third = load_run(inputs / "root" / "wanda" / "version_2")
    assert first.metrics.seconds["calibrate"] > 0
    for run in (second, third):
        assert "calibrate" not in run.metrics.seconds
        measured = {phase: first.metrics.seconds[phase] for phase in ("calibrate", "finish layers")}
        assert run.metrics.method.measured_seconds == measured
        assert calibration(run) == first.metrics.seconds["calibrate"]
    evaluating = sum(value for phase, value in first.metrics.seconds.items() if phase.startswith("evaluate"))
    assert evaluating > 0
    cost = (calibration(first) or 0.0) + (pruning(first) or 0.0)
    assert 0 < cost <= first.metrics.seconds["total"] - evaluating


def test_ratio_that_nobody_asked_for_is_not_recorded(inputs: Path) -> None:
    run = prune(ShortGPT(str(inputs / "model"), n_remove_layers=1), inputs / "tokens.npy", inputs / "logs")
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics["pruning_ratio"]["requested"] is None
    assert load_run(run.folder).requested == metrics["pruning_ratio"]["achieved"]
    assert "Pruning ratio requested" not in (run.pruned / "README.md").read_text()


# Numerical trouble


def test_bad_weights_are_named_whatever_the_precision(inputs: Path) -> None:
    model = make_tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(inputs / "broken")
    with pytest.raises(FloatingPointError) as error:
        prune(Wanda(str(inputs / "broken")), inputs / "tokens.npy", inputs / "logs", "bf16-true")
    message = str(error.value)
    assert "themselves hold NaN or infinite values, first in model.layers.1.mlp.up_proj.weight" in message
    assert "--trainer.precision" not in message
    assert not (inputs / "logs").exists()


@pytest.mark.parametrize(
    ("precision", "advice"),
    [
        ("32-true", "Precision 32-true is in use already"),
        ("bf16-true", "Use --trainer.precision 32-true."),
        ("16-true", "Use --trainer.precision bf16-true or 32-true."),
    ],
)
def test_advice_never_names_the_precision_in_use(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, precision: str, advice: str
) -> None:
    def decide(method: Magnitude) -> None:
        raise FloatingPointError("layer 3: values are NaN or infinite.")

    monkeypatch.setattr(Magnitude, "decide", decide)
    with pytest.raises(FloatingPointError) as error:
        prune(Magnitude(str(inputs / "model")), inputs / "tokens.npy", inputs / "logs", precision)
    assert str(error.value).startswith(f"layer 3: values are NaN or infinite. {advice}")
    assert f"Use --trainer.precision {precision}" not in str(error.value)


# Many at once


def all_of(forks: Forks, commands: list[list[str]]) -> list[str]:
    """Start all at once; what each printed. Every one must succeed."""
    ended = forks.together(commands)
    assert [one.status for one in ended] == [0] * len(ended), [one.printed[-500:] for one in ended]
    return [one.printed for one in ended]


@pytest.mark.slow
def test_runs_that_start_together_are_whole_and_unmixed(inputs: Path, forks: Forks) -> None:
    ratios = [0.1, 0.2, 0.3, 0.4]
    printed = all_of(forks, [["fit", *options(inputs), f"--model.pruning_ratio={ratio}"] for ratio in ratios])
    folders = [Path(out.splitlines()[-1].removeprefix("pruned model: ")).parent for out in printed]
    for ratio, folder in zip(ratios, folders, strict=True):
        run = load_run(folder)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["model"]["init_args"]["pruning_ratio"] == run.requested == ratio
        assert RunFolder.open(folder, "--run").plan.pruning_ratio == ratio
        assert f"| Pruning ratio achieved | {run.achieved:.4f} |" in (folder / "pruned" / "README.md").read_text()
    assert len(set(folders)) == len(entries(inputs / "root" / "magnitude")) == 4

    decided = all_of(forks, [["decide", f"--run={folder}", "--model.label=again"] for folder in folders])
    for folder, out in zip(folders, decided, strict=True):
        again = Path(out.splitlines()[-1].removeprefix("pruned model: ")).parent
        assert (again / "scores.csv").read_bytes() == (folder / "scores.csv").read_bytes()
        assert json.loads((again / "method.json").read_text())["measured_by"] == str(folder)
    tests = all_of(forks, [["test", *options(inputs)[1:], "--trainer.logger=false"] for _ in range(4)])
    assert len({out.splitlines()[-1] for out in tests}) == len(entries(inputs / "root" / "test")) == 4
    assert not [path for path in (inputs / "root").rglob("*") if path.name.startswith(".") or path.name == "unfinished"]


@pytest.mark.slow
def test_several_ranks_write_one_folder(inputs: Path) -> None:
    np.save(inputs / "tokens.npy", tiny_tokens(8, 16).numpy())
    arguments = [*options(inputs), "--trainer.devices=2"]
    command = [sys.executable, "-m", "lightning_prune", "fit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.splitlines()[-1] == f"pruned model: {inputs / 'root' / 'magnitude' / 'version_0' / 'pruned'}"
    assert entries(inputs / "root") == ["magnitude"]
    assert entries(inputs / "root" / "magnitude") == ["version_0"]
    assert load_run(inputs / "root" / "magnitude" / "version_0").achieved > 0.1
