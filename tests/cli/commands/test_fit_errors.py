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

WANDA = str(Path(__file__).parents[3] / "configs" / "wanda.yaml")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and inputs that are wrong in one way each."""
    root = tmp_path_factory.mktemp("inputs")
    make_tiny().save_pretrained(root / "model")
    for name, tokens in {
        "good": tiny_tokens(6, 16),
        "big_ids": tiny_tokens(6, 16) + 900,
        "long": tiny_tokens(6, 200),
    }.items():
        np.save(root / f"{name}.npy", tokens.numpy())
    (root / "short.txt").write_text("one two three four")
    (root / "gpt2").mkdir()
    (root / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    shutil.copytree(root / "model", root / "no_weights")
    (root / "no_weights" / "model.safetensors").unlink()
    for name, text in {
        "not_yaml": "model: [\n",
        "unknown_group": "modle:\n  a: 1\n",
        "unknown_data": "model:\n  class_path: lightning_prune.methods.Wanda\ndata:\n  num_sample: 3\n",
        "unknown_model": "model:\n  class_path: lightning_prune.methods.Wanda\n  init_args:\n    pruning_ratoi: 0.2\n",
        "unknown_class": "model:\n  class_path: lightning_prune.methods.Wandaa\n",
    }.items():
        (root / f"{name}.yaml").write_text(text)
    return root


@pytest.fixture
def fit(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``fit(options…)`` runs the command on good inputs but for the options; returns the message of its failure."""

    def run(*options: str, config: str = WANDA) -> str:
        root = tmp_path / "logs"
        good = ["--config", config, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(root)]
        if config == WANDA:
            good += ["--model.pretrained", f"{inputs}/model", "--data.dataset", f"{inputs}/good.npy"]
            good += ["--data.eval_datasets", "[]"]
        status = main(["fit", *good, *[option.replace("INPUTS", str(inputs)) for option in options]])
        printed = capsys.readouterr()
        assert status == 2, printed
        assert not root.exists(), list(root.rglob("*"))
        assert "Traceback" not in printed.err
        assert "Given value" not in printed.err  # jsonargparse's own words
        lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, printed.err
        return lines[0]

    return run


MISTAKES = {
    "unknown dataset": (["--data.dataset", "wikitext"], ["unknown dataset 'wikitext'", "wikitext2", "--data.dataset"]),
    "missing array": (["--data.dataset", "nowhere.npy"], ["no token array at nowhere.npy", "--data.dataset"]),
    "evaluation token": (["--data.eval_datasets", "[INPUTS/big_ids.npy]"], ["token id 995", "--data.eval_datasets"]),
    "too long": (["--data.dataset", "INPUTS/long.npy"], ["windows of 200 tokens", "128 positions", "--data.seq_len"]),
    "no weights": (["--model.pretrained", "INPUTS/no_weights"], ["--model.pretrained", "model.safetensors"]),
    "unknown family": (["--model.pretrained", "INPUTS/gpt2"], ["--model.pretrained", "'gpt2' is not supported"]),
    "freeze all": (["--model.freeze_first_n_layers", "4"], ["--model.freeze_first_n_layers 4", "none of the 4 layers"]),
    "batch size 0": (["--data.batch_size", "0"], ["--data.batch_size is 0", "at least 1"]),
    "model option": (["--model.pruning_ratoi", "0.2"], ["pruning_ratoi", "Did you mean --model.pruning_ratio?"]),
    "joined option": (["--model.pruning_ratoi=0.2"], ["pruning_ratoi", "Did you mean --model.pruning_ratio?"]),
    "trainer option": (["--trainer.precission", "x"], ["option --trainer.precission", "mean --trainer.precision?"]),
    "data option": (["--data.num_sample", "3"], ["unknown option --data.num_sample", "--data.num_samples?"]),
    "no group": (["--num_samples", "3"], ["unknown option --num_samples", "--data.num_samples?"]),
    "far off option": (["--frobnicate", "3"], ["unknown option --frobnicate", "See --help"]),
    "not offered": (["--trainer.max_epochs", "2"], ["unknown option --trainer.max_epochs"]),
    "stray word": (["stray"], ["unexpected argument 'stray'"]),
    "no value": (["--data.seed"], ["--data.seed", "expected one argument"]),
    "ratio type": (["--model.pruning_ratio", "abc"], ["--model.pruning_ratio: found abc", "a number"]),
    "integer type": (["--data.num_samples", "1.5"], ["--data.num_samples: found 1.5", "a whole number"]),
    "list type": (["--data.eval_datasets", "wikitext2"], ["--data.eval_datasets: found wikitext2", "a list"]),
    "method choice": (["--model.allocation", "sideways"], ["--model.allocation: found sideways", "global, uniform"]),
    "null": (["--model.pruning_ratio", "null"], ["--model.pruning_ratio: found null", "float"]),
    "precision": (["--trainer.precision", "8bit"], ["--trainer.precision: found 8bit", "bf16-true"]),
    "accelerator": (["--trainer.accelerator", "quantum"], ["--trainer", "quantum"]),
    "logger without its options": (["--trainer.logger", "CSVLogger"], ["--trainer.logger", "save_dir"]),
    "callback without its options": (["--trainer.callbacks+=GradientAccumulationScheduler"], ["scheduling"]),
    "method class": (["--model", "Wandaa"], ["unknown method 'Wandaa'", "HGSP, Magnitude, ShortGPT"]),
    "half a method": (["--model", "GroupPruning"], ["'GroupPruning' is not a method", "HGSP, Magnitude, ShortGPT"]),
    "method module": (["--model", "nowhere.Foo"], ["unknown method 'nowhere.Foo'"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_in_one_message(fit: Callable[..., str], mistake: str) -> None:
    options, expected = MISTAKES[mistake]
    message = fit(*options)
    for words in expected:
        assert words in message


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("nowhere.yaml", ["--config", "cannot read", "nowhere.yaml"]),
        ("INPUTS/not_yaml.yaml", ["--config", "line 2", "YAML"]),
        ("INPUTS/unknown_group.yaml", ["unknown option --modle.a"]),
        ("INPUTS/unknown_data.yaml", ["unknown option --data.num_sample.", "Did you mean --data.num_samples?"]),
        ("INPUTS/unknown_model.yaml", ["pruning_ratoi", "Did you mean --model.pruning_ratio?"]),
        ("INPUTS/unknown_class.yaml", ["unknown method 'lightning_prune.methods.Wandaa'", "Methods: FLAP, HGSP"]),
    ],
)
def test_mistake_in_a_configuration_file(
    fit: Callable[..., str], inputs: Path, config: str, expected: list[str]
) -> None:
    message = fit(config=config.replace("INPUTS", str(inputs)))
    for words in expected:
        assert words in message


def test_text_that_is_too_short_says_how_short(fit: Callable[..., str], tmp_path: Path) -> None:
    short = ["--model.pretrained", "demo", "--data.dataset", "INPUTS/short.txt", "--data.cache_dir", str(tmp_path)]
    message = fit(*short, "--data.num_samples", "5", "--data.seq_len", "8")
    assert "tokens, but 40 are needed (5 windows of 8)" in message
    assert "--data.num_samples" in message


def test_the_ratio_that_the_refusal_names_can_be_reached(
    fit: Callable[..., str], inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fit("--model.pruning_ratio", "0.95")
    ratio = message.partition("largest reachable ratio is ")[2].split()[0]
    options = [
        "--model.pretrained",
        f"{inputs}/model",
        "--data.dataset",
        f"{inputs}/good.npy",
        "--data.eval_datasets",
        "[]",
    ]
    options += ["--trainer.default_root_dir", str(tmp_path / "reached"), "--trainer.accelerator", "cpu"]
    assert main(["fit", "--config", WANDA, *options, "--model.pruning_ratio", ratio]) == 0
    metrics = json.loads((tmp_path / "reached" / "wanda" / "version_0" / "metrics.json").read_text())
    assert float(ratio) - 0.05 < metrics["pruning_ratio"]["achieved"] <= float(ratio)


def test_output_that_cannot_be_written(fit: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = fit("--trainer.default_root_dir", str(tmp_path / "file" / "below"))
    assert "--trainer.default_root_dir" in message
    assert "cannot write" in message


def full_disk(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_leaves_no_checkpoint(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decision was made and is small; it stays. Of the checkpoint nothing does."""
    monkeypatch.setattr(write._Shards, "write", full_disk)
    options = [
        "--model.pretrained",
        f"{inputs}/model",
        "--data.dataset",
        f"{inputs}/good.npy",
        "--data.eval_datasets",
        "[]",
    ]
    options += ["--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    assert main(["fit", "--config", WANDA, *options]) == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "--trainer.default_root_dir" in message
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "findings"]
    names = {path.name for path in files if "tfevents" not in path.name}
    kept = {"config.yaml", "scores.csv", "plan.json", "method.json", "hparams.yaml", "unfinished", "started.json"}
    assert names == kept
    assert "stays and is not finished" in message
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".") or path.name == "pruned"]


def test_full_disk_before_anything_is_saved_leaves_nothing(
    fit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_prune.support.files.Path.touch", full_disk)
    message = fit()
    assert "No space left on device" in message
    assert "--trainer.default_root_dir" in message
