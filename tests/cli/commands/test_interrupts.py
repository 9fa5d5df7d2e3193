"""SIGINT and SIGTERM end a run with 130 and 143, leave nothing half-written, and say what stays."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_prune.checkpoint import write
from lightning_prune.cli import main
from lightning_prune.methods.base import PruningMethod
from lightning_prune.runs.folder import RunFolder
from tests.tiny import make_tiny, tiny_tokens

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., int]:
    """Runs a shipped configuration on a tiny model below ``tmp_path/root``."""
    make_tiny().save_pretrained(tmp_path / "model")
    np.save(tmp_path / "tokens.npy", tiny_tokens(12, 16).numpy())

    def run(config: str = "wanda") -> int:
        options = ["--model.pretrained", f"{tmp_path}/model", "--data.dataset", f"{tmp_path}/tokens.npy"]
        options += ["--data.eval_datasets", "[]", "--trainer.default_root_dir", f"{tmp_path}/root"]
        return main(["fit", "--config", config, "--trainer.accelerator", "cpu", *options])

    return run


def kill_before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, calls: int = 1) -> None:
    """The process gets the signal as the ``calls``-th call of a method begins, and once more in the clean-up."""
    real, seen = getattr(owner, name), []

    def method(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == calls:
            os.kill(os.getpid(), number)
        return real(self, *args, **options)

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize(("config", "number"), [("hgsp_taylor", signal.SIGINT), ("shortgpt", signal.SIGTERM)])
def test_signal_while_calibrating_leaves_nothing(
    fit: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, number: int, config: str
) -> None:
    before = {one: signal.getsignal(one) for one in STATUS}
    kill_before(monkeypatch, PruningMethod, "training_step", number, calls=2)
    assert fit(config) == STATUS[number]
    assert not (tmp_path / "root").exists()
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"interrupted by {signal.Signals(number).name}; nothing half-written is left"
    )
    assert {one: signal.getsignal(one) for one in STATUS} == before


def test_signal_after_saving_names_the_folder_and_what_it_holds(
    fit: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    kill_before(monkeypatch, RunFolder, "append_to_card", signal.SIGTERM)
    assert fit() == 143
    folder = tmp_path / "root" / "wanda" / "version_0"
    message, stays, held, resume = capsys.readouterr().err.splitlines()[-1].split("; ")
    assert message == "interrupted by SIGTERM"
    assert stays == f"'{folder}' stays and is not finished"
    assert resume == f"'lightning-prune fit --config {folder}/config.yaml --resume' continues from there"
    assert set(held.removeprefix("it holds ").split(", ")) == {path.name for path in folder.iterdir()}
    assert {"pruned", "scores.csv", "plan.json", "unfinished"} <= {path.name for path in folder.iterdir()}
    monkeypatch.undo()
    assert fit() == 0  # the same configuration, finished, takes its place
    assert [path.name for path in folder.parent.iterdir()] == ["version_1"]


def test_signal_while_saving_leaves_no_checkpoint_and_a_second_one_does_not_stop_the_clean_up(
    fit: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, removed = shutil.rmtree, []

    def rmtree(path: Path, *args: Any, **options: Any) -> None:
        removed.append(path)
        os.kill(os.getpid(), signal.SIGTERM)
        remove(path, *args, **options)

    kill_before(monkeypatch, write._Shards, "write", signal.SIGINT, calls=8)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert fit() == 130
    monkeypatch.undo()
    assert removed
    names = {path.name for path in tmp_path.rglob("*")}
    assert not {name for name in names if name.startswith(".") or name in ("pruned", "metrics.json")}


@pytest.mark.slow
def test_process_that_is_interrupted_while_calibrating(tmp_path: Path) -> None:
    """The real command, in a process of its own, in the middle of a pass that would take minutes."""
    np.save(tmp_path / "tokens.npy", np.zeros((20000, 128), dtype=np.int64))
    at_once = "from lightning_prune.support import progress; progress.LINE_EVERY = 0"
    code = f"{at_once}; from lightning_prune.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-uc", code, "fit", "--config", "wanda", "--data.dataset", f"{tmp_path}/tokens.npy"]
    command += ["--data.eval_datasets", "[]", "--trainer.default_root_dir", f"{tmp_path}/root"]
    process = subprocess.Popen(
        [*command, "--trainer.accelerator", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    printed = ""
    try:
        for line in process.stdout:
            printed += line
            if "calibrating" in line:
                process.send_signal(signal.SIGINT)
                break
        printed += process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert process.returncode == 130, printed
    assert "interrupted by SIGINT" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "root").exists()
