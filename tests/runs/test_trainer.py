"""Two processes calibrate on shares of the set and reach the decision that one process reaches."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_prune.cli import main
from lightning_prune.runs.trainer import CalibrationDDP, calibration_trainer, cpu_processes
from lightning_prune.support.errors import UserError
from tests.killing import Forks
from tests.methods.running import save_base
from tests.tiny import make_moe, make_tiny, tiny_tokens


def trainer(**options: Any) -> L.Trainer:
    return calibration_trainer(**{"accelerator": "cpu", "logger": False} | options)


@patch.dict(os.environ)  # Lightning writes ranks and addresses into it, which later processes would inherit
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


@pytest.mark.parametrize("devices", [2, "2", [0, 1], "[0, 1]", "0,1", 1, "1", "auto", [0], "[0]"])
def test_only_one_process_needs_no_process_group_and_several_never_wrap_the_model(devices: Any) -> None:
    found, ddp = trainer(devices=devices), trainer(devices=devices, strategy="ddp")
    assert type(ddp.strategy) is CalibrationDDP
    assert found.world_size == ddp.world_size == cpu_processes("cpu", devices)
    assert isinstance(found.strategy, SingleDeviceStrategy if found.world_size == 1 else CalibrationDDP)


@pytest.mark.parametrize("devices", [-1, "-1", 0, [], "", "x", [0, 0], None, 10**6, [1.5, "x"]])
def test_devices_that_the_processor_cannot_be(devices: Any) -> None:
    with pytest.raises(UserError, match=r"--trainer\.devices: found .* number of processes, from 1 to"):
        cpu_processes("cpu", devices)
    assert cpu_processes("gpu", devices) == devices  # for Lightning to judge


TORCHRUN_2 = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}
REFUSED: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"strategy": "ddp_spawn", "devices": 2}, {}, r"--trainer\.strategy: DDPStrategy .*lost"),
    ({"strategy": "ddp_fork", "devices": 2}, {}, r"--trainer\.strategy: DDPStrategy .*lost"),
    ({"num_nodes": 2}, {}, r"--trainer\.num_nodes: found 2, .*torchrun"),  # they would wait for each other
    ({}, TORCHRUN_2 | {"RANK": "0", "GROUP_RANK": "0"}, "torchrun started 2 processes, but the options make 1"),
    ({"callbacks": callbacks.EarlyStopping("x")}, {}, "EarlyStopping is made for training"),
    ({"callbacks": callbacks.ModelCheckpoint()}, {}, "ModelCheckpoint is made for training"),
    ({"callbacks": [callbacks.LearningRateMonitor()]}, {}, "LearningRateMonitor is made for training"),
]


@pytest.mark.parametrize(("options", "environment", "message"), REFUSED)
def test_what_loses_the_result_or_trains_is_refused(
    options: dict[str, Any], environment: dict[str, str], message: str
) -> None:
    with patch.dict(os.environ, environment), pytest.raises(UserError, match=message):
        trainer(**options)


def test_nodes_of_a_launcher_and_callbacks_that_watch_are_taken() -> None:
    bar, own = callbacks.TQDMProgressBar(), type("Own", (callbacks.Callback,), {})()
    with patch.dict(os.environ, {"NODE_RANK": "1"}):
        found = trainer(num_nodes=2, callbacks=[bar, own])
    assert (type(found.strategy), found.world_size) == (CalibrationDDP, 2)
    assert {bar, own} <= set(found.callbacks)


def torchrun_environment(node: int, port: int) -> dict[str, str]:
    """What torchrun sets for the one process of node ``node`` of two."""
    ranks = {"RANK": str(node), "GROUP_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return TORCHRUN_2 | ranks


def slurm_environment(task: int, port: int) -> dict[str, str]:
    """What srun sets for task ``task`` of two on one node."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "prune", "SLURM_JOBID": "4711", "SLURM_NODELIST": "localhost"}
    tasks = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    return job | tasks | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "MASTER_PORT": str(port)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "spelling", "make"),
    [
        ("hgsp_taylor_refit", "--trainer.devices 2 --trainer.strategy ddp", make_tiny),
        ("wanda", "torchrun", make_tiny),
        ("wanda", "two nodes", make_tiny),
        ("slimgpt", "slurm", make_tiny),
        *((config, "slurm", partial(make_moe, width=32)) for config in ("hgsp_kfac_refit", "reap", "heapr")),
    ],
)
def test_number_of_processes_does_not_change_the_plan_however_they_are_started(
    config: str, spelling: str, make: Callable[..., Any], tmp_path: Path, forks: Forks
) -> None:
    base = save_base(make(layers=3), tmp_path / "base")
    np.save(tmp_path / "tokens.npy", tiny_tokens(11, 16).numpy())  # 11 does not divide by 2 processes × batch 2
    words = ["fit", "--config", config, "--model.pretrained", base, "--data.dataset", str(tmp_path / "tokens.npy")]
    words += ["--data.eval_datasets", json.dumps([str(tmp_path / "tokens.npy")]), "--data.batch_size", "2"]
    words += ["--model.pruning_ratio", "0.3", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    words += ["--data.continuations", "0", "--trainer.default_root_dir"]
    assert main([*words, str(tmp_path / "one")]) == 0
    words += [str(tmp_path / "two"), "--trainer.devices", "2"]
    if spelling in ("two nodes", "slurm"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = torchrun_environment if spelling == "two nodes" else slurm_environment
        more = ["--trainer.devices", "1", "--trainer.num_nodes", "2"] if spelling == "two nodes" else []
        before = [f"os.environ.update({environment(rank, port)})" for rank in range(2)]
        ended = forks.together([[*words, *more]] * 2, before=before)
        printed, failed = [one.printed for one in ended], any(one.status for one in ended)
    else:  # started by Lightning or torchrun
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lightning_prune", *words]
        command = launcher if spelling == "torchrun" else ["lightning_prune", *words, *spelling.split()]
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=180)
        printed, failed = [done.stdout, done.stderr], bool(done.returncode)
    assert not failed, printed
    assert sum(line.startswith("pruned model: ") for text in printed for line in text.splitlines()) == 1
    one, two = (Path(folder) for root in ("one", "two") for folder in (tmp_path / root).glob("*/*"))
    plans = [json.loads((folder / "plan.json").read_text())["layers"] for folder in (one, two)]
    assert plans[0] == plans[1]
    alone, both = (json.loads((run / "metrics.json").read_text())["perplexity"]["tokens.npy"] for run in (one, two))
    assert both["tokens"] == alone["tokens"] == 11 * 15
    assert both["dense"] == pytest.approx(alone["dense"], rel=1e-6)
    assert both["pruned"] == pytest.approx(alone["pruned"], rel=1e-4)
