import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lightning_prune
from lightning_prune.cli import COMMANDS, main

HEAVY = ("torch", "lightning", "transformers", "datasets", "numpy", "matplotlib", "jsonargparse")


def test_help_of_the_command_is_quick_and_names_every_subcommand() -> None:
    code = (
        "import sys; from lightning_prune.cli import main; status = main(['--help']); "
        f"print('loaded:', [name for name in {HEAVY} if name in sys.modules], status)"
    )
    seconds = []
    for _ in range(3):  # the machine may be busy; one quick start is proof
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 0.5:
            break
    assert done.stdout.splitlines()[-1] == "loaded: [] 0", done
    assert min(seconds) < 0.5
    for command, what in COMMANDS.items():
        assert f"  {command:<9}{what}" in done.stdout
    assert "lightning-prune fit --config wanda" in done.stdout


def test_module_runs_like_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_prune"]
    done = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=importable()
    )
    assert (done.returncode, done.stdout) == (0, f"{lightning_prune.__version__}\n")
    wrong = subprocess.run(
        [*command, "fti"], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=importable()
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: unknown command 'fti'. Did you mean 'fit'?")


def importable() -> dict[str, str]:
    """Run from elsewhere, also where the package is not installed."""
    root = str(Path(lightning_prune.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: lightning-prune <command>" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "check", "tune"])
def test_a_command_alone_says_what_is_missing(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --model: no method is chosen. Methods: FLAP, HGSP")
    assert message.count("\n") == 1


def test_option_before_the_command_says_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "configs/wanda.yaml", "fit"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: '--config' stands before the command.")
    assert "lightning-prune fit --config FILE" in message


def test_unknown_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune"]) == 2
    message = capsys.readouterr().err
    assert "unknown command 'prune'" in message
    for command in COMMANDS:
        assert command in message


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "fit",
            ["--config", "--method wanda", "--model.help", "--data.num_samples", "--trainer.precision", "--resume"],
        ),
        ("check", ["--data.num_samples", "--trainer.precision"]),
        ("tune", ["--output", "--trials", "--data.num_samples"]),
        ("test", ["--model.pretrained", "--data.eval_datasets", "--data.eval_seq_len", "perplexity", "--quiet"]),
        ("apply", ["--plan", "--model", "--output", "No calibration"]),
        ("evaluate", ["--efficiency", "--zero-shot", "--device"]),
        ("export", ["--format", "--dtype"]),
        ("methods", ["configuration to start from"]),
    ],
)
def test_help_of_a_subcommand_teaches_its_options(
    command: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in words:
        assert word in text
    assert f"lightning-prune {command}" in text


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


def test_options_that_mean_nothing_to_a_calibration_are_not_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    for name in ("max_epochs", "limit_train_batches", "accumulate_grad_batches", "fast_dev_run", "plugins"):
        assert f"--trainer.{name}" not in text
