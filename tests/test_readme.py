"""What the README tells a newcomer to type works, and every shipped configuration can be read."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_prune.cli import main
from lightning_prune.runs.build import RunBuilder
from lightning_prune.runs.settings import read_settings

ROOT = Path(__file__).parent.parent
# Commands that need a model of the user's, or have tests of their own.
ELSEWHERE = ("path/or/hub-id", "../shared", "/tmp/reference", "compare")


def commands() -> list[str]:
    """Every `lightning-prune` command of the README's code blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line.split("&&")[-1].split("#")[0].strip() for line in lines if "lightning-prune" in line]
    return [command for command in found if command.startswith("lightning-prune")]


@pytest.mark.slow
def test_commands_of_the_readme_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = [command for command in commands() if not any(word in command for word in ELSEWHERE)]
    expected = ["fit", "test", "apply", "decide", "evaluate", "export", "fit", "tune", "recover"]
    assert [command.split()[1] for command in mine] == expected
    for command in mine:
        arguments = [
            str(tmp_path / Path(word).name) if word.startswith("/tmp/") else word for word in shlex.split(command)[1:]
        ]
        if arguments[0] == "evaluate":
            arguments += ["--batch-sizes", "1", "--repeats", "1", "--prompt-length", "8", "--decode-length", "4"]
        assert main(arguments) == 0, command
        out = capsys.readouterr().out.strip().splitlines()
        if arguments[0] in ("fit", "apply", "decide", "recover"):
            assert out[-1].startswith("pruned model: ")
    weights = tmp_path / "logs" / "wanda" / "version_0" / "pruned" / "model.safetensors"
    assert weights.read_bytes() == (tmp_path / "pruned" / "model.safetensors").read_bytes()


def test_every_readme_command_names_files_that_exist() -> None:
    named = re.findall(r"(configs/[\w.]+|docs/[\w.]+|CONTRIBUTING\.md|CHANGELOG\.md)", (ROOT / "README.md").read_text())
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "file",
    sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith(("compare", "recover"))),
    ids=lambda p: p.stem,
)
def test_shipped_configurations_build_their_method_and_leave_the_calibration_defaults_alone(file: Path) -> None:
    cli = RunBuilder(["--config", str(file)])
    assert cli.model.label == file.stem
    data = yaml.safe_load(file.read_text()).get("data", {})
    assert (file.stem == "shortgpt_512") == bool(data)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("compare*.yaml")), ids=lambda p: p.stem)
def test_shipped_experiments_can_be_read_and_name_what_each_system_differs_in(file: Path) -> None:
    settings = read_settings(file)
    systems = {repr(settings.configuration(label, settings.ratios[0])) for label in settings.systems}
    assert len(systems) == len(settings.systems) > 1


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "targets").glob("*.yaml")), ids=lambda p: p.stem)
def test_target_overlays_change_the_model_and_nothing_of_the_calibration_setting(file: Path) -> None:
    base = ["--config", str(ROOT / "configs" / "hgsp_taylor.yaml")]
    cli = RunBuilder([*base, "--config", str(file)])
    plain = RunBuilder(base)
    assert cli.model.pretrained != "demo"
    assert cli.model.importance == "taylor"
    for name in ("num_samples", "seq_len", "batch_size", "sampling", "seed"):
        assert getattr(cli.datamodule, name) == getattr(plain.datamodule, name)
