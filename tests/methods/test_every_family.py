"""Every family through the whole life of a run: placements, kill and resume, two processes, ``check``, apply.

An hour of runs that are alike, so neither the first tests nor CI make them: ``pytest -n 2 -m families`` before a
release, and after a change to a record.
"""

import json
import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.killing import Ended, Forks, Kill
from tests.methods.behaviour import save_model, save_tokens
from tests.runs.test_trainer import torchrun_environment
from tests.tiny import EVERY_FAMILY, EXPERTS, tiny_tokens

pytestmark = pytest.mark.families
BACKWARD = Kill("lightning_prune.calibration.backward:BackwardPass._differentiate", 5)
WRITING = Kill("lightning_prune.checkpoint.write:_Shards.write", 3)
FILES = ("plan.json", "scores.csv", "pruned/config.json", "pruned/model.safetensors")
DENSE = [(family, system) for family in EVERY_FAMILY for system in ("hgsp_kfac_refit", "shortgpt", "slimgpt")]
ROUTED = [(family, system) for family in EXPERTS for system in ("hgsp_kfac_refit", "reap", "shortgpt")]
REFUSED = "period"  # plans that a family's config has no words for


@pytest.mark.parametrize(
    ("family", "system", "experts"),
    [*((*case, False) for case in DENSE), *((*case, True) for case in ROUTED)],
)
def test_the_whole_life(tmp_path: Path, forks: Forks, family: str, system: str, experts: bool) -> None:
    fit = partial(_fit, forks, tmp_path, system)
    kinds = {"experts": True, "width": 32, "layers": 4} if experts else {}
    save_model(tmp_path / "model", family=family, **kinds)
    save_tokens(tmp_path / "tokens.npy", tiny_tokens(11, 16))
    ended = fit("whole", "--model.onload", "model")
    if ended.status == 2 and REFUSED in ended.printed:
        pytest.skip(ended.printed.strip()[:300])
    assert ended.status == 0, ended.printed
    expected = _result(tmp_path / "whole")

    first = BACKWARD if system == "hgsp_kfac_refit" else Kill("lightning_prune.calibration.results:Results.add", 2)
    for more, kill in (([], first), (["--resume"], WRITING)):
        assert fit("killed", "--model.onload", "layer", *more, kill=kill).status == -signal.SIGKILL
    ended = fit("killed", "--model.onload", "layer", "--resume")
    assert ended.status == 0, ended.printed
    assert _result(tmp_path / "killed") == expected

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = [f"os.environ.update({torchrun_environment(rank, port)})" for rank in range(2)]
    two = [*_words(tmp_path, system, "two"), "--trainer.num_nodes", "2", "--trainer.devices", "1"]
    both = forks.together([two] * 2, before=before)
    assert not any(one.status for one in both), [one.printed for one in both]
    plans = [json.loads(_result(tmp_path / root)["plan.json"])["layers"] for root in ("whole", "two")]
    assert plans[0] == plans[1]

    ended = forks.run(["check", *_words(tmp_path, system, "checked")[1:]])
    assert ended.status == 0, ended.printed
    (run,) = (tmp_path / "whole").glob("*/version_0")
    if "refit" not in system and system != "slimgpt":  # whose plan alone does not make the weights
        applied = ["apply", "--plan", f"{run}/plan.json", "--model", f"{tmp_path}/model"]
        ended = forks.run([*applied, "--output", f"{tmp_path}/applied"])
        assert ended.status == 0, ended.printed
        assert (tmp_path / "applied/model.safetensors").read_bytes() == expected["pruned/model.safetensors"]


def _words(folder: Path, system: str, root: str) -> list[str]:
    words = ["fit", "--config", system, "--model.pretrained", f"{folder}/model", "--model.pruning_ratio", "0.29"]
    words += ["--data.dataset", f"{folder}/tokens.npy", "--data.eval_datasets", f"[{folder}/tokens.npy]"]
    words += ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--data.continuations", "0"]
    return [*words, "--trainer.default_root_dir", f"{folder}/{root}"]


def _fit(forks: Forks, folder: Path, system: str, root: str, *more: str, kill: Kill | None = None) -> Ended:
    return forks.run([*_words(folder, system, root), *more], kill)


def _result(root: Path) -> dict[str, Any]:
    (metrics,) = root.glob("*/version_*/metrics.json")
    return {name: (metrics.parent / name).read_bytes() for name in FILES}
