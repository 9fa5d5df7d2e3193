"""``--config wanda`` works wherever the package is installed, and a path still means that file."""

import re
from pathlib import Path

import pytest

from lightning_prune.cli import main
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.runs import config_files
from lightning_prune.runs.build import RunBuilder, build
from lightning_prune.runs.config_files import config_file, shipped_folder, shipped_names, with_config_files
from lightning_prune.runs.settings import read_settings
from lightning_prune.support.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_file_in_configs_goes_by_its_name() -> None:
    files = {file.resolve() for file in (ROOT / "configs").rglob("*.yaml")}
    assert {config_file(name).resolve() for name in shipped_names()} == files
    assert len(shipped_names()) == len(files)
    assert config_file("targets/llama-3.1-8b").is_file()


def test_configs_inside_an_installed_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages" / "lightning_prune"
    (installed / "configs").mkdir(parents=True)
    (installed / "configs" / "mine.yaml").touch()
    monkeypatch.setattr(config_files, "__file__", str(installed / "runs" / "config_files.py"))
    assert shipped_folder() == installed / "configs"
    assert config_file("mine") == installed / "configs" / "mine.yaml"


def test_a_file_wins_over_a_shipped_name_a_folder_does_not_and_a_path_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "wanda").mkdir()
    assert config_file("wanda").samefile(ROOT / "configs" / "wanda.yaml")
    (tmp_path / "slimgpt").write_text("own")
    assert config_file("slimgpt").read_text() == "own"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "hgsp_wanda").write_text("own")
    assert config_file("hgsp_wanda", tmp_path / "deep").read_text() == "own"
    for path in ("configs/wanda.yaml", "wanda.yaml", "some/where", "x.yml", "x.json", "/abs/path"):
        assert config_file(path) == Path(path)  # its reader says what is wrong with it


@pytest.mark.parametrize(
    "words", [["fit", "--config", "wanad"], ["fit", "--config=wanad"], ["compare", "--config", "wanad"]]
)
def test_an_unknown_name_lists_what_is_shipped(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.search(r"--config: no file and no shipped configuration 'wanad'.*hgsp_taylor.*wanda", error)


def test_only_config_options_are_touched() -> None:
    arguments = ["--model.label", "wanda", "--config", "wanda", "--config=slimgpt", "--data.seq_len", "8"]
    found = with_config_files(arguments)
    assert [found[i] for i in (0, 1, 2, 5, 6)] == [arguments[i] for i in (0, 1, 2, 5, 6)]
    assert Path(found[3]).samefile(ROOT / "configs" / "wanda.yaml")
    assert Path(found[4].removeprefix("--config=")).samefile(ROOT / "configs" / "slimgpt.yaml")
    assert with_config_files(["fit", "--config"]) == ["fit", "--config"]
    for words in (["--method", "wanda"], ["--method=wanda"]):
        option, _, path = "=".join(with_config_files(words)).partition("=")
        assert option == "--config"
        assert Path(path).samefile(ROOT / "configs" / "wanda.yaml")


def test_the_shipped_experiment_goes_by_name_and_own_ones_may_name_shipped_systems(tmp_path: Path) -> None:
    shipped = read_settings(Path("compare"))
    assert shipped == read_settings(ROOT / "configs" / "compare.yaml")
    names = "magnitude wanda slimgpt shortgpt shortgpt_512 hgsp_taylor hgsp_wanda hgsp_kfac_refit"
    assert (list(shipped.systems), shipped.ratios) == (names.split(), [0.2, 0.3, 0.5])
    (tmp_path / "mine.yaml").write_text("systems: {a: wanda, b: {config: hgsp_taylor}}")
    mine = read_settings(tmp_path / "mine.yaml")
    assert mine.systems["b"]["model"]["class_path"] == shipped.systems["hgsp_taylor"]["model"]["class_path"]
    (tmp_path / "mine.yaml").write_text("systems: {a: nothing}")
    with pytest.raises(UserError, match=r"systems\.a: no file and no shipped configuration 'nothing'"):
        read_settings(tmp_path / "mine.yaml")


EXPERIMENTS = [name for name in shipped_names() if name.startswith("compare")]


@pytest.mark.parametrize("name", ["compare", *(pytest.param(one, marks=pytest.mark.slow) for one in EXPERIMENTS[1:])])
def test_every_system_of_a_shipped_experiment_builds_its_method(name: str) -> None:
    settings = read_settings(Path(name))
    configurations = {label: settings.configuration(label, settings.ratios[0]) for label in settings.systems}
    assert len({repr(one) for one in configurations.values()}) == len(configurations) > 1
    for label, configuration in configurations.items():
        method = build(label, configuration).model
        assert (method.label, method.pruning_ratio) == (label, settings.ratios[0])


@pytest.mark.parametrize("name", [name for name in shipped_names() if not name.startswith(("compare", "recover"))])
def test_a_shipped_configuration_leaves_the_calibration_defaults_alone(name: str) -> None:
    """But for ShortGPT's second setting and experts' one; a target is a model to put after a method, as that one is."""
    target, second = name.startswith("targets/"), name.startswith("calibration/")
    files = [*(["hgsp_taylor"] if target or second else []), name]
    run = RunBuilder([word for file in files for word in ("--config", str(config_file(file)))])
    assert run.model.label == ("hgsp_taylor" if target else f"hgsp_taylor_{Path(name).name}" if second else name)
    assert (run.model.pretrained == "demo") is not target
    defaults = CalibrationDataModule()
    setting = ("num_samples", "seq_len", "batch_size", "sampling", "seed")
    same = all(getattr(run.datamodule, option) == getattr(defaults, option) for option in setting)
    assert same is not (second or name == "shortgpt_512")


def test_methods_lists_every_shipped_method_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for file in (ROOT / "configs").glob("*.yaml"):
        if "lightning_prune.methods." in file.read_text() and not file.stem.startswith("compare"):
            assert sum(line.split()[:1] == [file.stem] for line in lines) == 1, file.stem
