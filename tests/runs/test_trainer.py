"""Two processes calibrate on shares of the set and reach the decision that one process reaches."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_prune.cli import main
from lightning_prune.runs.trainer import CalibrationDDP, calibration_trainer, cpu_processes
from lightning_prune.support.errors import UserError
from tests.methods.running import save_base
from tests.tiny import make_tiny, tiny_tokens


@pytest.mark.slow
@pytest.mark.parametrize("config", ["hgsp_taylor", "slimgpt", "hgsp_taylor_refit"])
def test_number_of_processes_does_not_change_the_plan(config: str, tmp_path: Path) -> None:
    base = save_base(make_tiny(layers=3), tmp_path / "base")
    np.save(tmp_path / "tokens.npy", tiny_tokens(11, 16).numpy())  # 11 does not divide by 2 processes × batch 2
    plans, weights, metrics = [], [], []
    for processes in (1, 2):
        root = tmp_path / str(processes)
        arguments = ["fit", "--config", config, "--model.pretrained", base]
        arguments += ["--data.dataset", str(tmp_path / "tokens.npy"), "--data.batch_size", "2"]
        arguments += ["--data.eval_datasets", json.dumps([str(tmp_path / "tokens.npy")])]
        arguments += ["--trainer.accelerator", "cpu", "--trainer.devices", str(processes)]
        arguments += ["--trainer.default_root_dir", str(root)]
        if processes == 1:
            assert main(arguments) == 0
        else:
            command = [sys.executable, "-m", "lightning_prune", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
        (folder,) = [path for path in root.glob("*/version_*") if (path / "plan.json").exists()]
        plans.append(json.loads((folder / "plan.json").read_text())["layers"])
        weights.append((folder / "pruned" / "model.safetensors").read_bytes())
        metrics.append(json.loads((folder / "metrics.json").read_text())["perplexity"]["tokens.npy"])
    assert plans[0] == plans[1]
    assert metrics[1]["tokens"] == metrics[0]["tokens"] == 11 * 15
    assert metrics[1]["dense"] == pytest.approx(metrics[0]["dense"], rel=1e-6)
    assert metrics[1]["pruned"] == pytest.approx(metrics[0]["pruned"], rel=1e-4)
    if config == "hgsp_taylor":
        assert weights[0] == weights[1]


def trainer(**options: Any) -> L.Trainer:
    return calibration_trainer(**{"accelerator": "cpu", "logger": False} | options)


@pytest.fixture
def environment() -> Iterator[None]:
    """Lightning writes ranks and addresses into it, which processes that are started later would inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("environment")
def test_no_rank_is_sent_the_weights_that_it_reads_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Measured(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3), requires_grad=False)

        def test_step(self, batch: Any) -> None:
            self.log("seen", self.weight.sum())

    sent: list[int] = []
    monkeypatch.setattr(torch.distributed, "_broadcast_coalesced", lambda group, tensors, *_: sent.append(len(tensors)))
    data = torch.utils.data.DataLoader([0, 1])
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    for strategy, expected in (("ddp", [1]), (CalibrationDDP(), [])):
        sent.clear()
        found = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, **options)
        found.test(Measured(), data, verbose=False)
        torch.distributed.destroy_process_group()
        assert sent == expected


@pytest.mark.parametrize("devices", [2, "2", [0, 1], "[0, 1]", "0,1", "[0,1]"])
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_several_processes_never_wrap_the_model(devices: Any, strategy: str) -> None:
    found = trainer(devices=devices, strategy=strategy)
    assert type(found.strategy) is CalibrationDDP
    assert found.world_size == 2


@pytest.mark.parametrize("devices", [1, "1", "auto", [0], "[0]"])
def test_one_process_needs_no_process_group(devices: Any) -> None:
    assert isinstance(trainer(devices=devices).strategy, SingleDeviceStrategy)
    assert type(trainer(devices=devices, strategy="ddp").strategy) is CalibrationDDP


@pytest.mark.parametrize("devices", [-1, "-1", 0, [], "", "x", [0, 0], None, 10**6, [1.5, "x"]])
def test_devices_that_the_processor_cannot_be(devices: Any) -> None:
    with pytest.raises(UserError, match=r"--trainer\.devices: found .* number of processes, from 1 to"):
        cpu_processes("cpu", devices)


@pytest.mark.parametrize("devices", [-1, [0, 1], "auto", "0,1"])
def test_devices_of_a_gpu_are_left_to_lightning(devices: Any) -> None:
    assert cpu_processes("gpu", devices) == devices


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_processes_whose_result_would_be_lost(strategy: str) -> None:
    with pytest.raises(UserError, match=r"--trainer\.strategy: DDPStrategy .*lost"):
        trainer(strategy=strategy, devices=2)


def test_nodes_without_a_launcher_would_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--trainer\.num_nodes: found 2, .*torchrun"):
        trainer(num_nodes=2)
    monkeypatch.setenv("NODE_RANK", "1")
    found = trainer(num_nodes=2)
    assert type(found.strategy) is CalibrationDDP
    assert found.world_size == 2


def test_torchrun_with_another_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in torchrun_environment(0, 2).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun started 2 processes, but the options make 1"):
        trainer()


def torchrun_environment(node: int, port: int) -> dict[str, str]:
    """What torchrun sets for the one process of node ``node`` of two."""
    one = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}
    ranks = {"RANK": str(node), "GROUP_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return one | ranks


def slurm_environment(task: int) -> dict[str, str]:
    """What srun sets for task ``task`` of two on one node."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "prune", "SLURM_JOBID": "4711", "SLURM_NODELIST": "localhost"}
    tasks = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    return job | tasks | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["[0, 1]", "two nodes", "ddp", "torchrun", "slurm"])
def test_however_processes_are_spelled_one_plan_comes_out(spelling: str, tmp_path: Path) -> None:
    base = save_base(make_tiny(), tmp_path / "base")
    np.save(tmp_path / "tokens.npy", tiny_tokens(5, 16).numpy())
    arguments = [sys.executable, "-m", "lightning_prune", "fit", "--config", "configs/wanda.yaml"]
    arguments += ["--model.pretrained", base, "--data.dataset", str(tmp_path / "tokens.npy")]
    arguments += ["--data.eval_datasets", "[]", "--data.batch_size", "2", "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.default_root_dir", str(tmp_path / "logs")]
    environments: list[dict[str, str]] = [{}]
    if spelling == "two nodes":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environments = [torchrun_environment(node, port) for node in range(2)]
        arguments += ["--trainer.num_nodes", "2"]
    elif spelling == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        arguments = [sys.executable, *launcher, *arguments[1:], "--trainer.devices", "2"]
    elif spelling == "slurm":
        environments = [slurm_environment(task) for task in range(2)]
        arguments += ["--trainer.devices", "2"]
    elif spelling == "ddp":
        arguments += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    else:
        arguments += ["--trainer.devices", spelling]
    started = [
        subprocess.Popen(arguments, env=os.environ | extra, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for extra in environments
    ]
    printed = [process.communicate(timeout=180)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), printed
    (plan,) = (tmp_path / "logs").rglob("plan.json")
    assert json.loads(plan.read_text())["achieved_ratio"] > 0
    assert sum(line.startswith("pruned model: ") for text in printed for line in text.splitlines()) == 1


@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint", "LearningRateMonitor"])
def test_callbacks_that_train_stop_or_save_are_refused_and_others_are_not(name: str) -> None:
    options = {"monitor": "x"} if name == "EarlyStopping" else {}
    with pytest.raises(UserError, match=f"{name} is made for training"):
        trainer(callbacks=getattr(callbacks, name)(**options))
    bar, own = callbacks.TQDMProgressBar(), type("Own", (callbacks.Callback,), {})()
    assert {bar, own} <= set(trainer(callbacks=[bar, own]).callbacks)
