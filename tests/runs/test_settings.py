import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_prune.runs.build import RunBuilder
from lightning_prune.runs.config_files import shipped_folder
from lightning_prune.runs.settings import read_settings
from lightning_prune.support.errors import UserError


def write(folder: Path, **experiment: object) -> Path:
    model = {"class_path": "lightning_prune.methods.Wanda", "init_args": {"pruning_ratio": 0.9, "round_to": 8}}
    (folder / "wanda.yaml").write_text(yaml.safe_dump({"model": model}))
    (folder / "own.yaml").write_text(yaml.safe_dump({"model": model, "data": {"seq_len": 512}}))
    content = {"systems": {"wanda": "wanda.yaml", "own": "own.yaml"}} | experiment
    (folder / "compare.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "compare.yaml"


def test_command_line_wins_over_the_file_and_a_systems_own_setting_stays(tmp_path: Path) -> None:
    path = write(tmp_path, ratios=[0.1], pretrained="some/model", data={"seed": 3, "seq_len": 64})
    found = read_settings(path).configuration("wanda", 0.3)
    expected = {"pretrained": "some/model", "label": "wanda", "pruning_ratio": 0.3, "round_to": 8}
    assert (found["model"]["init_args"], found["data"]) == (expected, {"seed": 3, "seq_len": 64})
    options = {"data.seed": "5", "data.eval_datasets": "[demo]", "trainer.precision": "bf16-true"}
    settings = read_settings(path, tmp_path, "other", [0.5, 0.25], ["own"], options)
    assert (settings.ratios, list(settings.systems)) == ([0.25, 0.5], ["own"])
    found = settings.configuration("own", 0.5)
    assert found["data"] == {"seed": 5, "eval_datasets": ["demo"], "seq_len": 512}
    assert (found["trainer"]["precision"], found["trainer"]["default_root_dir"]) == ("bf16-true", str(tmp_path))
    assert found["model"]["init_args"]["pretrained"] == "other"


def test_a_file_of_ones_own_is_a_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    file = write(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    Path("narrow.yaml").write_text("model: {class_path: lightning_prune.methods.Wanda, init_args: {round_to: 4}}")
    settings = read_settings(file, systems=["narrow.yaml", "wanda"])
    assert list(settings.systems) == ["narrow", "wanda"]
    made = settings.configuration("narrow", 0.2)["model"]["init_args"]
    assert (made["label"], made["round_to"]) == ("narrow", 4)
    with pytest.raises(UserError, match=r"systems\.absent: .*absent\.yaml"):
        read_settings(file, systems=["absent.yaml"])
    for two in (["wanda.yaml", "wanda"], ["narrow.yaml", "elsewhere/narrow.yaml"]):
        with pytest.raises(UserError, match=r"second system '(wanda|narrow)'\. Rename the file"):
            read_settings(file, systems=two)


def test_seed_of_the_experiment_applies_to_a_systems_own_setting_too(tmp_path: Path) -> None:
    settings = read_settings(write(tmp_path, data={"seed": 3}, seeds=[7, 0, 7]))
    assert settings.seeds == [0, 7]
    assert settings.configuration("own", 0.2, 7)["data"] == {"seed": 7, "seq_len": 512}
    assert settings.configuration("own", 0.2)["data"] == {"seed": 3, "seq_len": 512}
    assert read_settings(write(tmp_path, seeds=[7]), seeds=[1, 2]).seeds == [1, 2]


def test_a_copy_of_a_shipped_experiment_finds_the_shipped_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copy(shipped_folder() / "compare.yaml", tmp_path / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    for path in (Path(own), Path("mine.yaml")):
        assert read_settings(path).systems == read_settings(Path("compare")).systems


def test_a_size_that_is_given_takes_the_place_of_that_of_a_file(tmp_path: Path) -> None:
    size = {"target_memory": "2MB", "pruning_ratio": 0.9, "n_remove_layers": 2}
    method = {"class_path": "lightning_prune.methods.ShortGPT", "init_args": size}
    settings = read_settings(write(tmp_path, systems={"tuned": {"model": method}}))
    for given, options in ((0.3, {"pruning_ratio": 0.3}), ("800K", {"target_parameters": "800K"})):
        made = settings.configuration("tuned", given)["model"]["init_args"]
        assert {name: value for name, value in made.items() if name in {*size, *options}} == options
    tuned = tmp_path / "tuned.yaml"
    method = {"class_path": "lightning_prune.methods.Wanda", "init_args": {"target_memory": "2MB"}}
    tuned.write_text(yaml.safe_dump({"model": method}))
    assert RunBuilder(["--config", str(tuned), "--model.pruning_ratio=0.3"]).model.target is None
    assert RunBuilder(["--config", str(tuned), "--model.target_parameters", "800K"]).model.target.kind == "parameters"
    assert RunBuilder(["--config", str(tuned)]).model.target.kind == "memory"
    method = {"class_path": "lightning_prune.methods.ShortGPT", "init_args": {"n_remove_layers": 2}}
    tuned.write_text(yaml.safe_dump({"model": method}))
    assert RunBuilder([f"--config={tuned}", "--model.pruning_ratio=0.3"]).model.n_remove_layers is None


def test_a_system_may_change_a_file_or_be_any_method(tmp_path: Path) -> None:
    inline = {"config": "wanda.yaml", "model": {"init_args": {"round_to": 4, "allocation": "uniform"}}}
    settings = read_settings(write(tmp_path, systems={"narrow": inline}), systems=["narrow", "flap"])
    narrow, flap = (settings.configuration(label, 0.2)["model"] for label in settings.systems)
    assert narrow["class_path"] == "lightning_prune.methods.Wanda"
    assert (narrow["init_args"]["round_to"], narrow["init_args"]["allocation"]) == (4, "uniform")
    assert (list(settings.systems)[1], flap["class_path"]) == ("flap", "lightning_prune.methods.FLAP")


@pytest.mark.parametrize(
    ("file", "given", "message"),
    [
        ({"seeds": [0, 0.5]}, {}, r"seeds.* is 0.5"),
        ({}, {"ratios": [20.0]}, r"^--ratios: found 20; .* between 0 and 1"),
        ({}, {"seeds": [1, -1]}, r"seeds.* is -1"),
        ({}, {"seeds": [0], "options": {"data.seed": "1"}}, r"--data.seed: the experiment has --seeds"),
        ({}, {"systems": ["wandaa"]}, r"'wandaa' .*no such method\. Did you mean 'wanda'\? Systems: wanda, own\."),
    ],
)
def test_mistakes_are_named(tmp_path: Path, file: dict[str, Any], given: dict[str, Any], message: str) -> None:
    """Here what is not in the file alone; tests/hostile/test_experiments.py has the file's own."""
    with pytest.raises(UserError, match=message):
        read_settings(write(tmp_path, **file), **given)


@pytest.mark.parametrize(("options", "shown"), [({}, True), ({"trainer.enable_progress_bar": "false"}, False)])
def test_progress_is_the_experiments_and_no_single_runs(tmp_path: Path, options: dict[str, str], shown: bool) -> None:
    settings = read_settings(write(tmp_path), options=options)
    assert settings.show_progress is shown
    assert settings.configuration("wanda", 0.5)["trainer"]["enable_progress_bar"] is False
