"""``fit --resume``: the bytes of an undisturbed run wherever the process died, and a refusal that says why."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.calibration import stream_checkpoints as waypoints
from lightning_prune.runs.folder import RunFolder
from lightning_prune.support.files import Lock
from tests.killing import Ended, Forks, Kill
from tests.methods.behaviour import save_model, save_tokens
from tests.tiny import tiny_tokens

OPTIONS: dict[str, list[str]] = {
    "hgsp_taylor": ["--config", "hgsp_taylor"],
    "slimgpt": ["--config", "slimgpt"],
    "wanda_2to4": ["--config", "wanda", "--model.structure", "2:4", "--model.label", "wanda_2to4"],
}
# Calls before which the process is killed, one after the other: the second and later ones kill a resumed run.
PRIOR = Kill("lightning_prune.calibration.wavefront:RemovalPass.batch", 8)
BACKWARD = Kill("lightning_prune.calibration.backward:BackwardPass._differentiate", 5)
MLP = Kill("lightning_prune.calibration.loop:Walk.finish", 4)
KEEPING = Kill("lightning_prune.calibration.results:Findings.add", 3)
DECISION = Kill("lightning_prune.runs.folder:RunFolder.write_decision")
SHARDS = Kill("lightning_prune.checkpoint.write:_Shards.write", 20)
STREAMS = Kill("lightning_prune.calibration.stream_checkpoints:Waypoints.offer")
CHECK = Kill("lightning_prune.checkpoint.write:_check")
EVALUATION = Kill("lightning_prune.evaluation.perplexity:Evaluation.on_test_epoch_end")
RECORD = Kill("lightning_prune.runs.folder:RunFolder.write_results")


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    before = waypoints.WAIT, waypoints.SHARE
    waypoints.WAIT, waypoints.SHARE = 0.0, float("inf")  # a waypoint behind every step
    forks = Forks()
    yield forks
    forks.close()
    waypoints.WAIT, waypoints.SHARE = before


class Fit:
    """``fit`` on a tiny model below ``root``."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder, self.forks = folder, forks
        save_model(folder / "model")
        save_tokens(folder / "tokens.npy")
        save_tokens(folder / "held_out.npy", tiny_tokens(6, 16, seed=3))

    def argv(self, system: str, root: str, *more: str) -> list[str]:
        options = ["--model.pretrained", f"{self.folder}/model", "--data.dataset", f"{self.folder}/tokens.npy"]
        options += ["--data.eval_datasets", f"[{self.folder}/held_out.npy]", "--trainer.accelerator", "cpu"]
        options += ["--trainer.default_root_dir", f"{self.folder}/{root}", "--trainer.enable_progress_bar", "false"]
        return ["fit", *OPTIONS[system], *options, *more]

    def __call__(self, system: str, root: str, *more: str, kill: Kill | None = None) -> Ended:
        return self.forks.run(self.argv(system, root, *more), kill)

    def result(self, system: str, root: str) -> dict[str, bytes]:
        (metrics,) = (self.folder / root / system).glob("version_*/metrics.json")
        names = ["plan.json", "scores.csv", "config.yaml", "pruned/model.safetensors", "pruned/config.json"]
        found = {name: (metrics.parent / name).read_bytes() for name in names}
        found["config.yaml"] = found["config.yaml"].replace(f"/{root}".encode(), b"")
        return found


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Fit:
    return Fit(tmp_path_factory.mktemp("resume"), forks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "kills"),
    [
        ("hgsp_taylor", [BACKWARD, KEEPING, PRIOR, STREAMS, SHARDS, EVALUATION]),
        ("slimgpt", [MLP, MLP, DECISION, CHECK]),
        ("wanda_2to4", [KEEPING, SHARDS, RECORD]),
    ],
)
def test_a_run_that_was_killed_again_and_again_ends_with_the_bytes_of_an_undisturbed_one(
    fit: Fit, system: str, kills: list[Kill]
) -> None:
    assert fit(system, "undisturbed").status == 0
    for number, kill in enumerate(kills):
        more = ["--resume"] if number else []
        ended = fit(system, "killed", "--model.onload", "layer", *more, kill=kill)
        assert ended.status == -signal.SIGKILL, ended.printed
        assert not list((fit.folder / "killed" / system).rglob("metrics.json"))
    ended = fit(system, "killed", "--model.onload", "layer", "--resume")
    assert ended.status == 0, ended.printed
    folder = fit.folder / "killed" / system / "version_0"
    left = {path.name for path in folder.rglob("*")}
    assert not left & {"unfinished", "findings", "started.json"}
    assert not [name for name in left if name.startswith(".")]
    expected, found = fit.result(system, "undisturbed"), fit.result(system, "killed")
    expected["config.yaml"] = expected["config.yaml"].replace(b"onload: auto", b"onload: layer")
    assert found == expected


@pytest.fixture(scope="module")
def interrupted(fit: Fit) -> Path:
    """The folder of a run that was interrupted behind its second layer; says how to go on."""
    kill = Kill("lightning_prune.calibration.results:Findings.add", 3, signal=signal.SIGTERM)
    ended = fit("wanda_2to4", "interrupted", kill=kill)
    folder = fit.folder / "interrupted" / "wanda_2to4" / "version_0"
    assert ended.status == 143
    assert f"'lightning-prune fit --config {folder}/config.yaml --resume' goes on from there" in ended.printed
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model.pruning_ratio", "0.3"], "model.pruning_ratio: 0.2 then, 0.3 now"),
        (["--data.batch_size", "2"], "data.batch_size: 4 then, 2 now"),
        (["--trainer.precision", "bf16-true"], "trainer.precision: None then, bf16-true now"),
        (["--data.dataset", "held_out.npy"], "calibration tokens (SHA-256)"),
        (["--model.pretrained", "other"], "weights of the model (SHA-256)"),
    ],
)
def test_what_differs_is_named(fit: Fit, interrupted: Path, options: list[str], named: str) -> None:
    if not (fit.folder / "other").exists():
        save_model(fit.folder / "other", seed=1)
    option, value = options
    value = str(fit.folder / value) if (fit.folder / value).exists() else value
    ended = fit("wanda_2to4", "interrupted", option, value, "--resume")
    assert ended.status == 2
    assert named in ended.printed
    assert "version_0 differs in" in ended.printed
    assert (interrupted / "findings").is_dir()


@pytest.mark.slow
def test_the_same_text_with_other_content_is_named(fit: Fit, interrupted: Path) -> None:
    before = (fit.folder / "tokens.npy").read_bytes()
    try:
        save_tokens(fit.folder / "tokens.npy", tiny_tokens(10, 16, seed=8))
        ended = fit("wanda_2to4", "interrupted", "--resume")
    finally:
        (fit.folder / "tokens.npy").write_bytes(before)
    assert ended.status == 2
    assert "version_0 differs in calibration tokens (SHA-256)" in ended.printed


@pytest.mark.slow
def test_a_run_that_lives_is_not_taken_up(fit: Fit, interrupted: Path) -> None:
    lock = Lock.take(interrupted / "unfinished")
    assert lock is not None
    try:
        ended = fit("wanda_2to4", "interrupted", "--resume")
    finally:
        lock.release()
    assert ended.status == 2
    assert f"'{interrupted}' is still under way" in ended.printed


@pytest.mark.slow
def test_what_the_message_says_works_and_then_nothing_is_unfinished(fit: Fit, interrupted: Path) -> None:
    assert fit.forks.run(["fit", "--config", f"{interrupted}/config.yaml", "--resume"]).status == 0
    assert RunFolder(interrupted).is_finished
    ended = fit("wanda_2to4", "interrupted", "--resume")
    assert ended.status == 2
    assert "There is none at all" in ended.printed
    assert os.listdir(interrupted.parent) == ["version_0"]


@pytest.mark.slow
def test_only_fit_takes_the_option_and_its_help_says_so(forks: Forks, capsys: Any) -> None:
    assert "--resume" in forks.run(["fit", "--help"]).printed
    for argv in (["test"], ["compare", "--config", "compare"], ["fit", "--config", "wanda", "--resum"]):
        ended = forks.run([*argv, *([] if argv[0] == "fit" else ["--resume"])])
        assert ended.status == 2
        assert len([line for line in ended.printed.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.slow
def test_a_temporary_file_among_the_findings_of_a_dead_run_goes_with_the_next_run(fit: Fit) -> None:
    root = fit.folder / "other-ratio"
    shutil.rmtree(root, ignore_errors=True)
    kill = Kill("lightning_prune.calibration.results:Findings.add", 3)
    assert fit("wanda_2to4", "other-ratio", kill=kill).status == -signal.SIGKILL
    dead = root / "wanda_2to4" / "version_0" / "findings"
    (dead / ".step_00002.safetensors.0123abcd.tmp").write_bytes(b"half")
    assert fit("wanda_2to4", "other-ratio", "--model.pruning_ratio", "0.3").status == 0
    assert not [path for path in root.rglob("*") if path.name.startswith(".")]
    assert (dead / "step_00001.safetensors").is_file()  # of use for --resume, and of another configuration
