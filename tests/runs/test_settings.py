from pathlib import Path

import pytest
import yaml

from lightning_prune.runs.settings import read_settings
from lightning_prune.support.errors import UserError


def write(folder: Path, **experiment: object) -> Path:
    model = {"class_path": "lightning_prune.methods.Wanda", "init_args": {"pruning_ratio": 0.9, "round_to": 8}}
    (folder / "wanda.yaml").write_text(yaml.safe_dump({"model": model}))
    (folder / "own.yaml").write_text(yaml.safe_dump({"model": model, "data": {"seq_len": 512}}))
    content = {"systems": {"wanda": "wanda.yaml", "own": "own.yaml"}} | experiment
    (folder / "compare.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "compare.yaml"


def test_run_gets_its_label_ratio_model_and_the_shared_options(tmp_path: Path) -> None:
    path = write(tmp_path, pretrained="some/model", data={"seed": 3}, root=str(tmp_path / "out"))
    found = read_settings(path).configuration("wanda", 0.3)
    expected = {"pretrained": "some/model", "label": "wanda", "pruning_ratio": 0.3, "round_to": 8}
    assert found["model"]["init_args"] == expected
    assert found["data"] == {"seed": 3}
    assert found["trainer"]["default_root_dir"] == str(tmp_path / "out")


def test_command_line_wins_over_the_file_and_a_systems_own_setting_stays(tmp_path: Path) -> None:
    path = write(tmp_path, ratios=[0.1], data={"seed": 3, "seq_len": 64})
    options = {"data.seed": "5", "data.eval_datasets": "[demo]", "trainer.precision": "bf16-true"}
    settings = read_settings(path, tmp_path, "other", [0.5, 0.25], ["own"], options)
    assert settings.ratios == [0.25, 0.5]
    assert list(settings.systems) == ["own"]
    found = settings.configuration("own", 0.5)
    assert found["data"] == {"seed": 5, "eval_datasets": ["demo"], "seq_len": 512}
    assert found["trainer"]["precision"] == "bf16-true"
    assert found["model"]["init_args"]["pretrained"] == "other"


def test_seed_of_the_experiment_applies_to_a_systems_own_setting_too(tmp_path: Path) -> None:
    settings = read_settings(write(tmp_path, data={"seed": 3}, seeds=[7, 0, 7]))
    assert settings.seeds == [0, 7]
    assert settings.configuration("own", 0.2, 7)["data"] == {"seed": 7, "seq_len": 512}
    assert settings.configuration("own", 0.2)["data"] == {"seed": 3, "seq_len": 512}
    assert read_settings(write(tmp_path, seeds=[7]), seeds=[1, 2]).seeds == [1, 2]


def test_inline_system_overlays_a_file(tmp_path: Path) -> None:
    inline = {"config": "wanda.yaml", "model": {"init_args": {"round_to": 4, "allocation": "uniform"}}}
    found = read_settings(write(tmp_path, systems={"narrow": inline})).configuration("narrow", 0.2)
    assert found["model"]["class_path"] == "lightning_prune.methods.Wanda"
    assert found["model"]["init_args"]["round_to"] == 4
    assert found["model"]["init_args"]["allocation"] == "uniform"


def test_methods_that_the_file_does_not_name_are_systems_too(tmp_path: Path) -> None:
    systems = read_settings(write(tmp_path), systems=["own", "flap"]).systems
    assert list(systems) == ["own", "flap"]
    assert systems["flap"]["model"]["class_path"] == "lightning_prune.methods.FLAP"  # type: ignore[index]


def test_mistakes_are_named(tmp_path: Path) -> None:
    """Here what is not in the file alone; tests/hostile/test_experiments.py has the file's own."""
    with pytest.raises(UserError, match=r"seeds.* is 0.5"):
        read_settings(write(tmp_path, seeds=[0, 0.5]))
    with pytest.raises(UserError, match=r"seeds.* is -1"):
        read_settings(write(tmp_path), seeds=[1, -1])
    with pytest.raises(UserError, match=r"--data.seed: the experiment has --seeds"):
        read_settings(write(tmp_path), seeds=[0], options={"data.seed": "1"})
    with pytest.raises(UserError, match=r"'wandaa' .*no such method\. Did you mean 'wanda'\? Systems: wanda, own\."):
        read_settings(write(tmp_path), systems=["wandaa"])
    with pytest.raises(UserError, match=r"--config: cannot read .*none.yaml"):
        read_settings(tmp_path / "none.yaml")


def test_progress_is_the_experiments_and_no_single_runs(tmp_path: Path) -> None:
    path = write(tmp_path)
    shown = read_settings(path)
    silent = read_settings(path, options={"trainer.enable_progress_bar": "false"})
    assert (shown.show_progress, silent.show_progress) == (True, False)
    for settings in (shown, silent, read_settings(path, options={"trainer.enable_progress_bar": "true"})):
        assert settings.configuration("wanda", 0.5)["trainer"]["enable_progress_bar"] is False
