"""Every method's whole life on the simulated device: the CPU's plan and perplexity in both placements, in half
precisions and without float64, killed and resumed in the middle of a pass, and advice where memory runs out."""

import json
import signal
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.accelerator.conftest import On
from tests.killing import Ended, Forks, Kill
from tests.methods.behaviour import MODELS, save_model, save_tokens
from tests.tiny import tiny_tokens

FISHER = "--config hgsp_taylor --model.importance fisher --model.prior gradient"
SYSTEMS = {
    "magnitude": "--config magnitude",
    "wanda": "--config wanda",
    "flap": "--config flap",
    "hgsp_taylor": "--config hgsp_taylor",
    "hgsp_fisher": FISHER,
    "hgsp_kfac_refit": "--config hgsp_kfac_refit",
    "gisp": "--config gisp --model.steps 3",
    "slimgpt": "--config slimgpt",
    "shortgpt": "--config shortgpt",
    "wanda_2to4": "--config wanda --model.structure 2:4",
    "experts_kfac_refit": "--config hgsp_kfac_refit",
    "experts_taylor": "--config hgsp_taylor --model.prior gradient",
    "heapr": "--config heapr",
    "reap_refit": "--config reap --model.refit output",
}
EXPERTS = ("experts_kfac_refit", "experts_taylor", "heapr", "reap_refit")
# In half precisions the rounding of attention's two paths decides between units of these that are almost alike.
CLOSE = ("hgsp_taylor", "hgsp_fisher", "hgsp_kfac_refit", "gisp", "slimgpt")
# Of perplexities: attention takes another path there than on the CPU.
TOLERANCES = {"32-true": 1e-5, "bf16-true": 2e-2, "16-true": 2e-3, "bf16-mixed": 2e-2}
# One of each kind of pass.
QUICK = ("wanda", "slimgpt", "shortgpt", "hgsp_kfac_refit", "experts_kfac_refit")


class Fit:
    """``fit`` on a tiny model below a folder, on the device or the CPU."""

    def __init__(self, folder: Path, on_sim: On, forks: Forks) -> None:
        self.folder, self.on_sim, self.forks = folder, on_sim, forks
        save_model(folder / "model")
        save_model(folder / "experts", **MODELS["moe"])
        save_tokens(folder / "tokens.npy")
        save_tokens(folder / "held_out.npy", tiny_tokens(6, 16, seed=3))

    def words(self, system: str, root: str, precision: str, onload: str) -> list[str]:
        model, ratio = ("experts", 0.3) if system in EXPERTS else ("model", 0.2)
        words = ["fit", *SYSTEMS[system].split(), "--model.label", system, "--model.pruning_ratio", f"{ratio}"]
        words += ["--model.pretrained", f"{self.folder}/{model}"]
        words += ["--data.dataset", f"{self.folder}/tokens.npy"]
        words += ["--data.eval_datasets", f"[{self.folder}/held_out.npy]"]
        words += ["--trainer.default_root_dir", f"{self.folder}/{root}", "--trainer.logger", "false"]
        words += [] if (system, root) == ("wanda", "model") else ["--data.continuations", "0"]
        return [*words, "--trainer.precision", precision, "--model.onload", onload]

    def sim(
        self, system: str, root: str, *more: str, before: str = "", kill: Kill | None = None, **options: str
    ) -> Ended:
        words = self.words(system, root, options.get("precision", "32-true"), options.get("onload", "layer"))
        return self.on_sim(*before.split(), *words, *more, kill=kill)

    @lru_cache(None)  # noqa: B019 - of one module's fixture
    def cpu(self, system: str, precision: str) -> dict[str, Any]:
        root = f"cpu {precision}"
        ended = self.forks.run([*self.words(system, root, precision, "layer"), "--trainer.accelerator", "cpu"])
        assert ended.status == 0, ended.printed
        return self.result(system, root)

    def result(self, system: str, root: str) -> dict[str, Any]:
        """What was decided and what it is worth."""
        folder = self.folder / root / system / "version_0"
        metrics = json.loads((folder / "metrics.json").read_text())
        return {"plan": json.loads((folder / "plan.json").read_text()), "perplexity": metrics["perplexity"]}

    def check(self, ended: Ended, system: str, root: str, precision: str = "32-true") -> None:
        assert ended.status == 0, ended.printed
        expected, found = self.cpu(system, precision), self.result(system, root)
        alike = precision == "32-true" or system not in CLOSE
        assert not alike or found["plan"] == expected["plan"]
        environment = json.loads((self.folder / root / system / "version_0/environment.json").read_text())
        assert environment["device"] == "sim:0"
        for name, value in expected["perplexity"]["held_out.npy"].items():
            if name == "pruned" and not alike:
                continue
            assert found["perplexity"]["held_out.npy"][name] == pytest.approx(value, rel=TOLERANCES[precision]), name


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory, on_sim: On, forks: Forks) -> Fit:
    return Fit(tmp_path_factory.mktemp("life"), on_sim, forks)


@pytest.mark.parametrize("system", QUICK)
def test_it_decides_as_the_cpu(fit: Fit, system: str) -> None:
    """With the whole model on the device; killed runs have one layer there."""
    fit.check(fit.sim(system, "model", onload="model"), system, "model")


def test_other_commands_run_there_too(fit: Fit) -> None:
    assert fit.sim("wanda", "commands").status == 0
    run = fit.folder / "commands/wanda/version_0"
    ended = fit.on_sim(
        *f"evaluate --model {run} --efficiency --device gpu --repeats 1 --batch-sizes 2 --prompt-length 8".split(),
        *("--decode-length", "4"),
    )
    assert ended.status == 0, ended.printed
    found = json.loads((run / "efficiency.json").read_text())
    assert (found["device"], found["environment"]["gpus"][0]["name"]) == ("sim", "sim")
    weights = (run / "pruned/model.safetensors").stat().st_size
    assert 0.9 * weights < found["pruned"]["speed"][0]["peak_memory_bytes"] < 10 * weights
    ended = fit.on_sim("evaluate", "--model", run, "--efficiency", "--device", "cuda")
    assert ended.status == 2
    assert "--device: found cuda, but torch finds sim. Choose cpu or auto." in ended.printed
    save_tokens(fit.folder / "training.npy", tiny_tokens(40, 16, seed=5))
    for place, run_there in ({"cpu": fit.forks.run, "sim": lambda argv: fit.on_sim(*argv)}).items():
        words = f"recover --config recover_full --model.pretrained {run}/pruned --trainer.accelerator {place}"
        words += f" --data.dataset {fit.folder}/training.npy --data.batch_size 8 --trainer.max_epochs 1"
        words += f" --trainer.default_root_dir {fit.folder}/recovered-{place} --trainer.logger false"
        ended = run_there(words.split())
        assert ended.status == 0, ended.printed
    values = [
        json.loads(path.read_text())["perplexity"]["held_out.npy"]["pruned"]
        for path in sorted(fit.folder.glob("recovered-*/*/version_0/metrics.json"))
    ]
    assert values[0] == pytest.approx(values[1], rel=2e-2)  # Adam makes whole steps of rounding


@pytest.mark.parametrize(
    ("system", "precision"),
    [
        ("wanda", "bf16-true"),
        ("slimgpt", "16-true"),
        ("shortgpt", "bf16-mixed"),
        ("hgsp_kfac_refit", "bf16-true"),
    ],
)
def test_every_precision_decides_as_the_cpu(fit: Fit, system: str, precision: str) -> None:
    fit.check(fit.sim(system, precision, precision=precision), system, precision, precision)


@pytest.mark.parametrize("system", ["wanda", "slimgpt", "hgsp_kfac_refit"])  # forward, by block, backward
def test_memory_that_runs_out_in_the_middle_of_a_pass_ends_in_advice(fit: Fit, system: str) -> None:
    ended = fit.sim(system, "full", before="full lightning_prune.calibration.loop:CalibrationLoop.batch 8")
    assert ended.status == 2, ended.printed
    for words in ("Out of memory: sim out of memory", "--data.batch_size", "--trainer.precision bf16-true"):
        assert words in ended.printed
    assert "Traceback" not in ended.printed
    assert not list((fit.folder / "full").rglob("pruned"))


@pytest.mark.parametrize("system", SYSTEMS)
def test_killed_in_the_middle_of_a_pass_and_resumed_without_float64(fit: Fit, system: str) -> None:
    """One layer on a device that has no float64; above all layers on one that has."""
    kill = Kill("lightning_prune.calibration.loop:CalibrationLoop.finish", 3)
    ended = fit.sim(system, "killed", before="eager single", kill=kill)
    assert ended.status == -signal.SIGKILL, ended.printed
    for path in (fit.folder / "killed" / system).rglob("streams.pt"):
        for name, values in torch.load(path, weights_only=True)["values"].items():
            assert bool(torch.isfinite(values).all()), name
    fit.check(fit.sim(system, "killed", "--resume", before="single"), system, "killed")
