import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_prune
from lightning_prune.cli import COMMANDS, KERNEL_CACHES, main

HEAVY = ("torch", "lightning", "transformers", "datasets", "numpy", "matplotlib", "jsonargparse")


def loaded_by(words: list[str]) -> tuple[str, list[str]]:
    """What a command prints in a process of its own, and which heavy modules it imports."""
    code = (
        f"import sys; from lightning_prune.cli import main; assert main({words}) == 0; "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, ast.literal_eval(done.stdout.splitlines()[-1])


def test_help_of_the_command_is_quick_and_names_every_subcommand() -> None:
    before = os.times()
    text, loaded = loaded_by(["--help"])
    spent = os.times()
    assert spent.children_user + spent.children_system - before.children_user - before.children_system < 0.5
    assert loaded == loaded_by(["compare", "--help"])[1] == []
    for command, what in COMMANDS.items():
        assert f"  {command:<9}{what}" in text
    assert "lightning-prune fit --config wanda" in text


def test_module_runs_like_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_prune", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(Path(lightning_prune.__file__).parents[1])}  # not installed
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (0, f"{lightning_prune.__version__}\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], ["usage: lightning-prune <command>"]),
        (["--config", "wanda", "fit"], ["'--config' comes before the command", "lightning-prune fit --config FILE"]),
        (["prune"], ["unknown command 'prune'", *COMMANDS]),
        (["fti"], ["unknown command 'fti'. Did you mean 'fit'?"]),
        *(([name], ["error: --model: no method is chosen. Methods: FLAP, HGSP"]) for name in ("fit", "check", "tune")),
    ],
)
def test_half_a_command_is_told_what_is_missing(
    words: list[str], told: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main(words) == 2
    shown = "".join(capsys.readouterr())
    assert [one for one in told if one not in shown] == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fit", "--config --method --model.help --data.num_samples --trainer.precision --resume"),
        ("check", "--data.num_samples --trainer.precision"),
        ("tune", "--output --trials --data.num_samples"),
        ("test", "--model.pretrained --data.eval_datasets --data.eval_seq_len perplexity --quiet"),
        ("compare", "--config --runs --root --output --model --ratios --systems --seeds --zero-shot --strict"),
        ("apply", "--plan --model --output"),
        ("evaluate", "--efficiency --zero-shot --device"),
        ("export", "--format --dtype"),
        ("methods", "configuration"),
    ],
)
def test_help_of_a_subcommand_teaches_its_options(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert [word for word in (f"lightning-prune {command}", *words.split()) if word not in text] == []
    for name in ("max_epochs", "limit_train_batches", "accumulate_grad_batches", "fast_dev_run", "plugins"):
        assert f"--trainer.{name}" not in text  # means nothing to a calibration


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--model.help=ShortGPT"], "n_remove_layers"),
        (["--method", "wanda", "--help"], "freeze_first_n_layers"),
        (["--config=hgsp_taylor", "-h"], "temperature"),
    ],
)
def test_options_of_a_method_are_listed_with_what_they_do(
    words: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *words]) == 0
    text = capsys.readouterr().out
    assert f"--model.{option} " in text
    assert "Share of all parameters" in " ".join(text.split())
    assert "--trainer.precision" not in text


SHAPES = """
import os, sys
from lightning_prune.cli import KERNEL_CACHES

if sys.argv[1] == "few":
    os.environ.update(KERNEL_CACHES)
import torch
from lightning_prune.support.memory import anonymous_bytes

x = torch.ones(256, 64, dtype=torch.bfloat16)
w = torch.ones(2048, 64, dtype=torch.bfloat16)
before = anonymous_bytes()
for width in range(1, 601):
    torch.nn.functional.linear(x, w[:width])
print(anonymous_bytes() - before)
"""


def grown(which: str) -> int:
    """Bytes that a process keeps after as many shapes of matrix products as a deep pruned model has."""
    clean = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES} | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", SHAPES, which]
    return int(subprocess.run(words, capture_output=True, text=True, check=True, env=clean).stdout)


@pytest.mark.slow
def test_kernels_of_layers_that_are_done_are_forgotten() -> None:
    all_of_them = grown("all")
    if all_of_them < 20 * 2**20:
        pytest.skip("this processor compiles no kernel for a product in bf16")
    assert grown("few") < all_of_them / 3


def test_the_command_sets_what_is_not_set_already(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNEL_CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    assert main(["methods"]) == 0
    assert {name: os.environ[name] for name in KERNEL_CACHES} == KERNEL_CACHES | {"LRU_CACHE_CAPACITY": "7"}
