"""Every mistake ends in exit status 2 and one message that names what was found, what is allowed and the option."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_prune.checkpoint import write
from lightning_prune.cli import main
from tests.tiny import make_tiny, tiny_tokens


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and inputs that are wrong in one way each."""
    root = tmp_path_factory.mktemp("inputs")
    make_tiny().save_pretrained(root / "model")
    for name, more in {"good": 0, "big_ids": 900}.items():
        np.save(root / f"{name}.npy", tiny_tokens(6, 16).numpy() + more)
    (root / "short.txt").write_text("one two three four")
    (root / "gpt2").mkdir()
    (root / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    shutil.copytree(root / "model", root / "no_weights")
    (root / "no_weights" / "model.safetensors").unlink()
    for name, text in {
        "unknown_group": "modle:\n  a: 1\n",
        "unknown_data": "model:\n  class_path: lightning_prune.methods.Wanda\ndata:\n  num_sample: 3\n",
        "unknown_model": "model:\n  class_path: lightning_prune.methods.Wanda\n  init_args:\n    pruning_ratoi: 0.2\n",
        "unknown_class": "model:\n  class_path: lightning_prune.methods.Wandaa\n",
    }.items():
        (root / f"{name}.yaml").write_text(text)
    return root


@pytest.fixture
def good(inputs: Path) -> list[str]:
    """Words of a command that is right."""
    model = ["--config", "wanda", "--model.pretrained", f"{inputs}/model", "--trainer.accelerator", "cpu"]
    return [*model, "--data.dataset", f"{inputs}/good.npy", "--data.eval_datasets", "[]"]


@pytest.fixture
def fit(inputs: Path, good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``fit(options…)`` runs the command on good inputs but for the options; returns the message of its failure."""

    def run(*options: str) -> str:
        root = tmp_path / "logs"
        given = [option.replace("INPUTS", str(inputs)) for option in options]
        words = [] if options[:1] == ("--config",) else good
        status = main(["fit", *words, "--trainer.default_root_dir", str(root), *given])
        printed = capsys.readouterr()
        assert status == 2, printed
        assert not root.exists(), list(root.rglob("*"))
        assert "Traceback" not in printed.err
        assert "Given value" not in printed.err  # jsonargparse's own words
        (message,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        return message

    return run


# What is refused whatever the words is in tests/hostile; here are those that say what to do instead.
MISTAKES = {
    "evaluation token": (["--data.eval_datasets", "[INPUTS/big_ids.npy]"], ["token id 995", "--data.eval_datasets"]),
    "too short": (
        ["--model.pretrained", "demo", "--data.dataset", "INPUTS/short.txt", "--data.cache_dir", "INPUTS/cache"],
        ["tokens, but 16384 are needed (128 windows of 128)", "--data.num_samples"],
    ),
    "no weights": (["--model.pretrained", "INPUTS/no_weights"], ["--model.pretrained", "model.safetensors"]),
    "unknown family": (["--model.pretrained", "INPUTS/gpt2"], ["--model.pretrained", "'gpt2' is not supported"]),
    "freeze all": (["--model.freeze_first_n_layers", "4"], ["--model.freeze_first_n_layers 4", "none of the 4 layers"]),
    "model option": (["--model.pruning_ratoi", "0.2"], ["pruning_ratoi", "Did you mean --model.pruning_ratio?"]),
    "dashed option": (
        ["--model.pruning-ratio", "0.2"],
        ["--model.pruning-ratio.", "Did you mean --model.pruning_ratio?"],
    ),
    "option of another method": (
        ["--model.importance", "kfac"],
        ["--model.importance of this method; methods that have it: HGSP"],
    ),
    "part of a name": (["--ratio", "0.2"], ["unknown option --ratio. Did you mean", "--model.pruning_ratio"]),
    "an experiment": (["--config", "compare"], ["'compare' is an experiment", "lightning-prune compare --config"]),
    "joined option": (["--model.pruning_ratoi=0.2"], ["pruning_ratoi", "Did you mean --model.pruning_ratio?"]),
    "data option": (["--data.num_sample", "3"], ["unknown option --data.num_sample", "--data.num_samples?"]),
    "no group": (["--num_samples", "3"], ["unknown option --num_samples", "--data.num_samples?"]),
    "far off option": (["--frobnicate", "3"], ["unknown option --frobnicate", "See --help"]),
    "stray word": (["stray"], ["unexpected argument 'stray'"]),
    "no value": (["--data.seed"], ["--data.seed", "expected one argument"]),
    "ratio type": (["--model.pruning_ratio", "abc"], ["--model.pruning_ratio: found abc", "a number"]),
    "integer type": (["--data.num_samples", "1.5"], ["--data.num_samples: found 1.5", "a whole number"]),
    "two sizes": (
        ["--model.pruning_ratio=0.3", "--model.target_memory", "9MiB"],
        ["--model.pruning_ratio and --model.target_memory: give one of them"],
    ),
    "list type": (["--data.eval_datasets", "wikitext2"], ["--data.eval_datasets: found wikitext2", "a list"]),
    "method choice": (["--model.allocation", "sideways"], ["--model.allocation: found sideways", "global, uniform"]),
    "null": (["--model.pruning_ratio", "null"], ["--model.pruning_ratio: found null", "float"]),
    "precision": (["--trainer.precision", "8bit"], ["--trainer.precision: found 8bit", "bf16-true"]),
    "logger without its options": (["--trainer.logger", "CSVLogger"], ["--trainer.logger", "save_dir"]),
    "callback without its options": (["--trainer.callbacks+=GradientAccumulationScheduler"], ["scheduling"]),
    "method class": (["--model", "Wandaa"], ["unknown method 'Wandaa'", "Magnitude, ShortGPT, SlimGPT"]),
    "half a method": (["--model", "GroupPruning"], ["'GroupPruning' is not a method", "Magnitude, ShortGPT, SlimGPT"]),
    "method module": (
        ["--model", "nowhere.Foo"],
        ["unknown method 'nowhere.Foo', which cannot be imported (No module named 'nowhere'", "PYTHONPATH"],
    ),
    "group in a file": (["--config", "INPUTS/unknown_group.yaml"], ["unknown option --modle.a"]),
    "data option in a file": (
        ["--config", "INPUTS/unknown_data.yaml"],
        ["unknown option --data.num_sample.", "Did you mean --data.num_samples?"],
    ),
    "model option in a file": (
        ["--config", "INPUTS/unknown_model.yaml"],
        ["pruning_ratoi", "Did you mean --model.pruning_ratio?"],
    ),
    "method in a file": (
        ["--config", "INPUTS/unknown_class.yaml"],
        ["unknown method 'lightning_prune.methods.Wandaa'", "Methods: FLAP, HGSP"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_in_one_message(fit: Callable[..., str], mistake: str) -> None:
    options, expected = MISTAKES[mistake]
    message = fit(*options)
    assert [words for words in expected if words not in message] == []


def test_the_ratio_that_the_refusal_names_can_be_reached(
    fit: Callable[..., str], good: list[str], tmp_path: Path
) -> None:
    message = fit("--model.pruning_ratio", "0.95")
    ratio = message.partition("largest reachable ratio is ")[2].split()[0]
    root = ["--trainer.default_root_dir", str(tmp_path / "reached")]
    assert main(["fit", *good, *root, "--model.pruning_ratio", ratio]) == 0
    metrics = json.loads((tmp_path / "reached" / "wanda" / "version_0" / "metrics.json").read_text())
    assert float(ratio) - 0.05 < metrics["pruning_ratio"]["achieved"] <= float(ratio)


def full_disk(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_leaves_no_checkpoint(
    good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decision was made and is small; it is kept. Of the checkpoint nothing is."""
    monkeypatch.setattr(write._Shards, "write", full_disk)
    assert main(["fit", *good, "--trainer.default_root_dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    for words in ("No space left on device", "--trainer.default_root_dir", "stays and is not finished"):
        assert words in message
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "layer_results"]
    names = {path.name for path in files if "tfevents" not in path.name}
    kept = {"config.yaml", "scores.csv", "plan.json", "method.json", "hparams.yaml", "unfinished", "started.json"}
    assert names == kept
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".") or path.name == "pruned"]
