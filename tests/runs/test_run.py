"""One run: what it records, and what it leaves when it cannot go on."""

import errno
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from lightning_prune.cli import main
from lightning_prune.comparison.costs import calibration, pruning
from lightning_prune.comparison.records import load_run
from lightning_prune.methods import Magnitude, ShortGPT, Wanda
from lightning_prune.runs.environment import environment, peak_memory_bytes
from lightning_prune.runs.folder import RunFolder
from lightning_prune.runs.records import Environment
from lightning_prune.support.errors import UserError
from tests.methods.behaviour import prune, save_model, save_tokens
from tests.tiny import make_tiny, tiny_tokens


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    save_model(tmp_path / "model")
    save_tokens(tmp_path / "tokens.npy")
    save_tokens(tmp_path / "held_out.npy", tiny_tokens(6, 16, seed=5))
    return tmp_path


def options(inputs: Path, method: str = "Magnitude", *more: str) -> list[str]:
    words = f"--model={method} --model.pretrained={inputs}/model --data.dataset={inputs}/tokens.npy "
    words += f"--data.eval_datasets=[{inputs}/held_out.npy] --data.cache_dir={inputs}/cache --data.continuations=0 "
    words += f"--trainer.default_root_dir={inputs}/root --trainer.accelerator=cpu --trainer.enable_progress_bar=false"
    return [*words.split(), "--trainer.logger=false", *more]


def test_folder_is_claimed_with_and_without_a_logger(inputs: Path) -> None:
    for number, logger in enumerate(["true", "false"]):
        assert main(["fit", *options(inputs, "Magnitude", f"--trainer.logger={logger}")]) == 0
        run = RunFolder.open(inputs / "root" / "magnitude" / f"version_{number}", "--run")
        events = list(run.path.glob("20%"))  # TensorBoard shows the path to them
        assert bool(events) == (logger == "true")
    points = EventAccumulator(str(inputs / "root/magnitude/version_0/20%")).Reload().Scalars("importance/layer")
    assert [point.step for point in points] == [0, 1, 2, 3]
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
    assert main([command, *(arguments if command == "fit" else arguments[1:]), "--trainer.logger=true"]) == 2
    shown = capfd.readouterr().err
    assert "Traceback" not in shown
    assert shown.splitlines()[-1].startswith("error: --trainer.default_root_dir: cannot write below")
    assert not (inputs / "root").exists()


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
    cost = (calibration(first) or 0.0) + (pruning(first) or 0.0)
    assert 0 < cost <= first.metrics.seconds["total"] - evaluating < first.metrics.seconds["total"]


def test_a_run_from_before_the_option_began_no_window_with_a_token(inputs: Path) -> None:
    assert main(["fit", *options(inputs, "Magnitude")]) == 0
    root = inputs / "root" / "magnitude"
    config = root / "version_0" / "config.yaml"
    assert "  bos: auto\n" in config.read_text()
    config.write_text(config.read_text().replace("  bos: auto\n", ""))
    assert main(["decide", f"--run={root / 'version_0'}", "--model.pruning_ratio=0.3"]) == 0
    assert "  bos: never\n" in (root / "version_1" / "config.yaml").read_text()


def test_ratio_that_nobody_asked_for_is_not_recorded(inputs: Path) -> None:
    run = prune(ShortGPT(str(inputs / "model"), n_remove_layers=1), inputs / "tokens.npy", inputs / "logs")
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics["pruning_ratio"]["requested"] is run.method.plan.pruning_ratio is None
    assert json.loads((run.folder / "method.json").read_text())["n_remove_layers"] == 1
    assert load_run(run.folder).requested == metrics["pruning_ratio"]["achieved"]
    assert "Pruning ratio requested" not in (run.pruned / "README.md").read_text()


def test_advice_names_bad_weights_and_else_never_the_precision_in_use(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(inputs / "broken")
    with pytest.raises(FloatingPointError) as error:
        prune(Wanda(str(inputs / "broken")), inputs / "tokens.npy", inputs / "logs", "bf16-true")
    assert "themselves hold NaN or infinite values, first in model.layers.1.mlp.up_proj.weight" in str(error.value)
    assert "--trainer.precision" not in str(error.value)
    assert not (inputs / "logs").exists()
    found = "layer 3: values are NaN or infinite."
    monkeypatch.setattr(Magnitude, "decide", Mock(side_effect=FloatingPointError(found)))
    for precision, advice in (
        ("32-true", "Precision 32-true is in use already"),
        ("bf16-true", "Use --trainer.precision 32-true."),
        ("16-true", "Use --trainer.precision bf16-true or 32-true."),
    ):
        with pytest.raises(FloatingPointError) as error:
            prune(Magnitude(str(inputs / "model")), inputs / "tokens.npy", inputs / "logs", precision)
        assert str(error.value).startswith(f"{found} {advice}")


def test_environment_is_enough_for_a_papers_appendix() -> None:
    found = environment("bf16-true", torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert Environment.model_validate(found, strict=True)
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (found["precision"], found["device"]) == ("bf16-true", "cpu")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_what_the_kernel_counts_in_bytes() -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    assert peak_memory_bytes() == pytest.approx(kibibytes * 1024, rel=0.05)
