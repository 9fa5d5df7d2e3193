"""The short ``--help``: one page, at once, and nothing on it that the real parser does not take."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_prune import methods
from lightning_prune.cli import main
from lightning_prune.cli.signatures import options_of
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.evaluation.perplexity import Evaluation
from lightning_prune.recovery import Recovery, RecoveryDataModule

COMMANDS = ("fit", "check", "tune", "test", "recover")


def page(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words, "--help"]) == 0
    return capsys.readouterr().out


def taken(owner: type) -> dict[str, object]:
    """Names and defaults that a class takes, as Python itself sees them along the bases that options reach."""
    found: dict[str, object] = {}
    for base in owner.__mro__:
        if "__init__" not in vars(base):
            continue
        own = inspect.signature(vars(base)["__init__"]).parameters.values()
        for one in own:
            if one.name != "self" and one.kind is one.POSITIONAL_OR_KEYWORD:
                found.setdefault(one.name, one.default)
        if not any(one.kind is one.VAR_KEYWORD for one in own):
            break
    return found


@pytest.mark.parametrize(
    "owner",
    [
        *(getattr(methods, name) for name in methods.__all__),
        *(Evaluation, Recovery, CalibrationDataModule, RecoveryDataModule),
    ],
)
def test_options_are_read_from_the_source_as_python_has_them(owner: type) -> None:
    read = {one.name: one for one in options_of(f"{owner.__module__}.{owner.__name__}")}
    expected = taken(owner)
    assert read.keys() == expected.keys()
    for name, default in expected.items():
        text = "" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        assert read[name].default == text, name
        assert read[name].text, f"{owner.__name__}.{name} is not described"


def test_a_description_is_whole_and_a_base_describes_what_its_child_does_not() -> None:
    wanda = {one.name: one for one in options_of("lightning_prune.methods.Wanda")}
    assert wanda["sequential"].text.startswith("For masks: calibrate each layer on the output of the masked layers")
    assert wanda["sequential"].text.endswith("in one pass.")
    assert wanda["pretrained"].text == (
        "Model folder or hub id to prune. ``demo`` is the small model inside the package."
    )


def test_a_class_that_is_not_there_is_a_lookup_error() -> None:
    with pytest.raises(LookupError):
        options_of("lightning_prune.methods.Wandaa")
    with pytest.raises(LookupError):
        options_of("collections.OrderedDict")


@pytest.mark.parametrize("command", COMMANDS)
def test_everything_on_the_page_is_an_option_of_the_command(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    short = page(capsys, command)
    assert main([command, "--help-all"]) == 0
    full = capsys.readouterr().out
    assert len(full.splitlines()) > 150  # Lightning's
    # taken before the parser
    own = {"memory", "host-memory", "json", "output", "trials", "shifts", "resume", "overwrite", "quiet"}
    for name in re.findall(r"^  --([\w.-]+)", short, re.MULTILINE):
        described_by_the_method = name.startswith("model.") and command in ("fit", "check", "tune")
        assert f"--{name}" in full or name in own or described_by_the_method, name


@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_is_a_page(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = page(capsys, command).splitlines()
    assert len(lines) <= 65
    text = "\n".join(lines)
    for name in ("--model.pretrained", "--data.eval_datasets", "--trainer.precision", f"{command} --help-all"):
        assert name in text


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_lines_fit_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    options = re.findall(r"^ {10,}\S.*$", page(capsys, "fit", "--method", "hgsp_taylor"), re.MULTILINE)
    assert options
    assert max(map(len, options)) <= max(60, min(columns, 120))


def test_a_named_method_shows_its_own_options_with_what_its_configuration_sets(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    general = page(capsys, "fit")
    assert "--config wanda" in general
    assert "--model.importance" not in general
    for words in (["--config", "hgsp_wanda"], ["--config=hgsp_wanda"], ["--method", "hgsp_wanda"]):
        shown = page(capsys, "fit", *words)
        assert re.search(r"--model\.importance .*?\[wanda\]", shown, re.DOTALL)
        assert "--config shortgpt" not in shown
    own = tmp_path / "own.yaml"
    own.write_text("data: {num_samples: 32}\ntrainer: {precision: bf16-true}\n")
    shown = page(capsys, "check", "--model", "HGSP", "--config", str(own))
    assert re.search(r"--model\.importance .*?\[taylor\]", shown, re.DOTALL)
    assert "calibration windows [32]" in shown
    assert "[bf16-true]" in shown


def test_a_class_from_elsewhere_is_referred_to_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model.help=my_package.Mine" in page(capsys, "fit", "--model", "my_package.Mine")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "wandaa"], "no shipped configuration 'wandaa'"),
        (["--config", "nowhere.yaml"], "cannot read 'nowhere.yaml'"),
        (["--model", "Wandaa"], "unknown method 'Wandaa'. Did you mean 'Wanda'?"),
    ],
)
def test_a_mistake_beside_help_ends_in_one_message(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *words, "--help"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from lightning_prune.cli import main; main(['fit', '--config', 'wanda', '--help']); "
        "print('loaded:', [name for name in ('torch', 'lightning', 'jsonargparse', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "loaded: []", done
