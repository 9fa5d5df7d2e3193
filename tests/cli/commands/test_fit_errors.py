"""Every mistake ends in exit status 2 and one message that names what was found, what is allowed and the option."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from lightning_prune.checkpoint import write
from lightning_prune.checkpoint.family_check import check_family
from lightning_prune.cli import main
from tests.tiny import make_tiny, tiny_tokens

# An accelerator that this machine does not have.
ABSENT = "mps" if torch.cuda.is_available() else "cuda" if torch.backends.mps.is_available() else "gpu"
# Words after the good ones -> what the message says; where they begin with a file, it is the configuration.
MISTAKES = {
    "--data.eval_datasets [INPUTS/big_ids.npy]": ("token id 995", "--data.eval_datasets"),
    "--model.pretrained demo --data.dataset INPUTS/short.txt --data.cache_dir INPUTS/cache": (
        "tokens, but 16384 are needed (128 windows of 128)",
        "--data.num_samples",
    ),
    "--model.freeze_first_n_layers 4": ("--model.freeze_first_n_layers 4", "none of the 4 layers"),
    "--model.pruning_ratoi 0.2": ("pruning_ratoi", "Did you mean --model.pruning_ratio?"),
    "--model.pruning_ratoi=0.2": ("pruning_ratoi", "Did you mean --model.pruning_ratio?"),
    "--model.pruning-ratio 0.2": ("--model.pruning-ratio.", "Did you mean --model.pruning_ratio?"),
    "--model.importance kfac": ("--model.importance of this method; methods that have it: HGSP",),
    "--model.options 3": ("unknown option --model.options. ",),
    "--model.ratio 0.2": ("unknown option --model.ratio. Did you mean --model.pruning_ratio?",),
    "--ratio 0.2": ("unknown option --ratio. Did you mean", "--model.pruning_ratio"),
    "--config compare": ("'compare' is an experiment", "lightning-prune compare --config"),
    "--data.num_sample 3": ("unknown option --data.num_sample", "--data.num_samples?"),
    "--num_samples 3": ("unknown option --num_samples", "--data.num_samples?"),
    "--frobnicate 3": ("unknown option --frobnicate", "See --help"),
    "stray": ("unexpected argument 'stray'. Options are",),
    "flap": ("unexpected argument 'flap'. Did you mean --config flap?",),
    "--model.pretrained no/where": ("no folder here, and",),
    "--data.seed": ("--data.seed", "expected one argument"),
    "--model.pruning_ratio abc": ("--model.pruning_ratio: found abc; allowed: a share between 0 and 1, such as 0.3.",),
    "--model.pruning_ratio null": ("--model.pruning_ratio: found null", "float"),
    "--data.num_samples 1.5": ("--data.num_samples: found 1.5", "a whole number"),
    "--model.pruning_ratio=0.3 --model.target_memory 9MiB": (
        "--model.pruning_ratio and --model.target_memory: give one of them",
    ),
    "--data.eval_datasets wikitext2": ("--data.eval_datasets: found wikitext2", "a list"),
    "--model.allocation sideways": ("--model.allocation: found sideways", "global, uniform"),
    "--trainer.precision 8bit": ("--trainer.precision: found 8bit", "bf16-true"),
    "--trainer.precision bf16": ("--trainer.precision: found bf16; allowed: 32-true", "Did you mean 'bf16-true'?"),
    f"--trainer.accelerator {ABSENT}": (f"--trainer.accelerator: found {ABSENT}", "Give cpu, or auto"),
    "--trainer.logger CSVLogger": ("--trainer.logger", "save_dir"),
    "--trainer.callbacks+=GradientAccumulationScheduler": ("scheduling",),
    "--model Wandaa": ("unknown method 'Wandaa'. Did you mean 'Wanda'?", "Magnitude, ShortGPT, SlimGPT"),
    "--model GroupPruning": ("'GroupPruning' is not a method", "Magnitude, ShortGPT, SlimGPT"),
    "--model nowhere.Foo": (
        "unknown method 'nowhere.Foo', which cannot be imported (No module named 'nowhere'",
        "PYTHONPATH",
    ),
    "modle: {a: 1}": ("unknown option --modle.a",),
    "data: {num_sample: 3}": ("unknown option --data.num_sample.", "Did you mean --data.num_samples?"),
    "model: {init_args: {pruning_ratoi: 0.2}}": ("pruning_ratoi", "Did you mean --model.pruning_ratio?"),
    "model: {class_path: lightning_prune.methods.Wandaa}": (
        "unknown method 'lightning_prune.methods.Wandaa'. Did you mean 'Wanda'?",
        "Methods: FLAP, HGSP",
    ),
}


@pytest.fixture
def good(tmp_path: Path) -> list[str]:
    """Words of a command that is right."""
    make_tiny().save_pretrained(tmp_path / "model")
    for name, more in {"good": 0, "big_ids": 900}.items():
        np.save(tmp_path / f"{name}.npy", tiny_tokens(6, 16).numpy() + more)
    model = ["fit", "--config", "wanda", "--model.pretrained", f"{tmp_path}/model", "--trainer.accelerator", "cpu"]
    return [*model, "--data.dataset", f"{tmp_path}/good.npy", "--data.eval_datasets", "[]"]


def refused(words: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a command that fails and leaves nothing."""
    assert main([*words, "--trainer.default_root_dir", str(root)]) == 2
    printed = capsys.readouterr().err
    assert not root.exists(), list(root.rglob("*"))
    assert "Traceback" not in printed
    assert "Given value" not in printed  # jsonargparse's own words
    (message,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    return message


# What is refused whatever the words is in tests/hostile; here are those that say what to do instead.
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_in_one_message(
    good: list[str], mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("one two three four")
    words = mistake.replace("INPUTS", str(tmp_path)).split()
    if ": " in mistake:
        (tmp_path / "c.yaml").write_text(mistake)
        words = ["--config", f"{tmp_path}/c.yaml"]
    message = refused([*good, *words], tmp_path / "logs", capsys)
    assert [words for words in MISTAKES[mistake] if words not in message] == []


def test_the_ratio_that_the_refusal_names_can_be_reached(
    good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused([*good, "--model.pruning_ratio", "0.95"], tmp_path / "logs", capsys)
    ratio = message.partition("largest reachable ratio is ")[2].split()[0]
    root = ["--trainer.default_root_dir", str(tmp_path / "reached")]
    assert main([*good, *root, "--model.pruning_ratio", ratio]) == 0
    metrics = json.loads((tmp_path / "reached" / "wanda" / "version_0" / "metrics.json").read_text())
    assert float(ratio) - 0.05 < metrics["pruning_ratio"]["achieved"] <= float(ratio)


def full_disk(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_leaves_no_checkpoint(
    good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decision was made and is small; it is kept. Of the checkpoint nothing is."""
    check_family(AutoConfig.from_pretrained(good[good.index("--model.pretrained") + 1]))  # which writes a model, too
    monkeypatch.setattr(write._Shards, "write", full_disk)
    assert main([*good, "--trainer.default_root_dir", f"{tmp_path}/logs"]) == 2
    message = capsys.readouterr().err
    for words in ("No space left on device", "--trainer.default_root_dir", "stays and is not finished"):
        assert words in message
    files = [path for path in (tmp_path / "logs").rglob("*") if path.is_file() and path.parent.name != "layer_results"]
    names = {path.name for path in files if "tfevents" not in path.name}
    kept = {"config.yaml", "scores.csv", "plan.json", "method.json", "hparams.yaml", "unfinished", "started.json"}
    assert names == kept
    assert not [path for path in (tmp_path / "logs").rglob("*") if path.name.startswith(".") or path.name == "pruned"]
