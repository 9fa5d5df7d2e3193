"""``lightning-prune recover`` as a user runs it, on a tiny model and token arrays."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lightning_prune
from lightning_prune.cli import main
from lightning_prune.recovery.zeros import linears_of
from tests.killing import Forks, Kill
from tests.methods.running import save_base
from tests.tiny import make_tiny, tiny_tokens

CPU = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")


def learnable(windows: int, seed: int) -> np.ndarray:
    """Counting, from a random start: what a tiny model learns within a few steps."""
    start = torch.randint(2, 96, (windows, 1), generator=torch.Generator().manual_seed(seed))
    return ((start + torch.arange(16) - 2) % 94 + 2).numpy()


def prune(place: Path, *options: str) -> Path:
    save_base(make_tiny(layers=3), place / "base")
    for seed, name in enumerate(("calibration", "test")):
        np.save(place / f"{name}.npy", tiny_tokens(8, 16, seed=seed).numpy())
    np.save(place / "train.npy", learnable(48, 7))
    words = ["--model.pretrained", str(place / "base"), "--data.dataset", str(place / "calibration.npy"), *CPU]
    words += ["--data.eval_datasets", json.dumps([str(place / "test.npy")]), "--trainer.default_root_dir"]
    assert main(["fit", *options, *words, str(place / "logs")]) == 0
    (folder,) = (path.parent for path in (place / "logs").rglob("pruned"))
    return folder


def words(place: Path, run: Path, *more: str) -> list[str]:
    return [
        *("recover", "--model.pretrained", str(run / "pruned"), "--data.dataset", str(place / "train.npy")),
        *("--data.batch_size", "8", "--model.learning_rate", "0.01"),
        *("--trainer.default_root_dir", str(place / "logs"), *CPU, *more),
    ]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("recover")
    return place, prune(place, "--config", "wanda", "--model.pruning_ratio", "0.25")


@pytest.mark.parametrize("config", ["recover_lora", "recover_full"])
def test_a_run_learns_and_leaves_a_folder_like_that_of_its_parent(
    pruned: tuple[Path, Path], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place, run = pruned
    assert main(words(place, run, "--config", config, "--trainer.max_epochs", "3")) == 0
    shown = capsys.readouterr().out
    folder = Path(shown.splitlines()[-1].removeprefix("pruned model: ")).parent
    recovery = json.loads((folder / "recovery.json").read_text())
    assert recovery["held_out_loss"]["after"] < recovery["held_out_loss"]["before"] - 0.1
    assert recovery["parent"] == str(run)
    assert recovery["tokens_seen"] == 3 * 46 * 16  # a twentieth of 48 windows is held out
    before, after = (load_file(one / "pruned" / "model.safetensors") for one in (run, folder))
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    assert (folder / "pruned" / "modeling_pruned.py").read_bytes() == (
        run / "pruned" / "modeling_pruned.py"
    ).read_bytes()
    parent, own = (json.loads((one / "metrics.json").read_text()) for one in (run, folder))
    assert recovery["perplexity"]["test.npy"] == parent["perplexity"]["test.npy"]["pruned"]
    assert own["perplexity"]["test.npy"]["dense"] == parent["perplexity"]["test.npy"]["dense"]
    assert own["self_check"]
    assert not (folder / "training").exists()
    assert main(["compare", "--runs", str(run), str(folder), "--root", str(place / f"report-{config}")]) == 0
    assert "Recovery" in capsys.readouterr().out


@pytest.mark.parametrize("config", ["recover_lora", "recover_full"])
def test_zeroed_weights_stay_zero(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = prune(tmp_path, "--config", "wanda", "--model.structure", "2:4")
    assert main(words(tmp_path, run, "--config", config, "--trainer.max_steps", "4")) == 0
    assert "all still zero" in capsys.readouterr().out
    (folder,) = (path.parent for path in (tmp_path / "logs").rglob("recovery.json"))
    before, after = (linears_of(lightning_prune.load(one / "pruned")) for one in (run, folder))
    moved = 0
    for name, linear in before.items():
        assert torch.equal(linear.weight == 0, after[name].weight == 0), name
        moved += int((linear.weight != after[name].weight).sum())
    assert moved


def test_a_run_that_was_killed_goes_on_to_the_weights_of_an_undisturbed_one(
    pruned: tuple[Path, Path], forks: Forks
) -> None:
    place, run = pruned
    argv = words(place, run, "--config", "recover_full", "--trainer.max_epochs", "4", "--trainer.logger", "false")
    calm = forks.run([*argv, "--model.label", "calm"])
    assert calm.status == 0, calm.printed
    kill = Kill("lightning_prune.recovery.module:Recovery.on_save_checkpoint", 5)
    argv += ["--model.label", "killed"]
    assert forks.run(argv, kill).status == -9
    again = forks.run([*argv, "--resume"])
    assert again.status == 0, again.printed
    folders = [place / "logs" / label / "version_0" for label in ("calm", "killed")]
    weights = [(folder / "pruned" / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    facts: list[Any] = [json.loads((folder / "recovery.json").read_text()) for folder in folders]
    for name in ("steps", "tokens_seen", "held_out_loss"):
        assert facts[0][name] == facts[1][name]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--model.distillation", "2"], "--model.distillation: found 2"),
        (["--model.train", "some"], "--model.train"),
        (["--data.dataset", "{place}/test.npy"], "the evaluation set 'test.npy'"),
        (["--data.held_out", "1"], "--data.held_out"),
        (["--model.pretrained", "{place}/base"], "is not the pruned folder of a finished run"),
        (["--model.pretrained", "{run}"], "Give '{run}/pruned'"),
        (["--model.teacher", "{place}/nowhere"], "--model.teacher"),
        (["--trainer.devices", "2"], "--trainer.devices"),
        (["--trainer.precision", "bf16-true", "--model.train", "all"], "--trainer.precision bf16-true"),
        (["--trainer.max_epochs", "-1"], "nothing ends this run"),
        (["--model.lora_rank", "0"], "--model.lora_rank: found 0"),
    ],
)
def test_mistakes_end_in_one_sentence_and_leave_nothing(
    pruned: tuple[Path, Path], more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place, run = pruned
    before = sorted((place / "logs").rglob("*"))
    filled = [word.replace("{place}", str(place)).replace("{run}", str(run)) for word in more]
    assert main([*words(place, run, "--config", "recover_lora"), *filled]) == 2
    assert says.replace("{run}", str(run)) in capsys.readouterr().err
    assert sorted((place / "logs").rglob("*")) == before
