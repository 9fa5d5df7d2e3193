import csv
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_prune.cli.commands.compare import main as compare
from lightning_prune.cli.commands.fit import main as fit
from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.records import load_run
from lightning_prune.comparison.repeats import by_size, repeats
from lightning_prune.comparison.tables import results as results_table
from lightning_prune.runs.experiment import plan_runs, run_experiment
from lightning_prune.runs.settings import read_settings
from lightning_prune.support import progress
from lightning_prune.support.errors import UserError
from tests.tiny import make_moe, make_tiny, tiny_tokenizer, tiny_tokens

CLASSES = {"magnitude": "Magnitude", "wanda": "Wanda", "shortgpt": "ShortGPT", "hgsp": "HGSP"}


def write_experiment(tmp_path: Path) -> Path:
    """Four systems, one of them with a text of its own, at two ratios on a tiny model and token arrays."""
    make_tiny(layers=6).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for seed, (name, rows, length) in enumerate((("calibration", 8, 16), ("test", 8, 16), ("second", 4, 32)), start=1):
        np.save(tmp_path / f"{name}.npy", tiny_tokens(rows, length, seed).numpy())
    systems: dict = {
        label: {"model": {"class_path": f"lightning_prune.methods.{name}"}} for label, name in CLASSES.items()
    }
    systems["shortgpt"]["data"] = {"dataset": str(tmp_path / "second.npy")}
    data = {"dataset": str(tmp_path / "calibration.npy"), "eval_datasets": [str(tmp_path / "test.npy")]}
    content = {"pretrained": str(tmp_path / "model"), "root": str(tmp_path / "logs"), "ratios": [0.2, 0.4]}
    content |= {
        "systems": systems,
        "data": data | {"continuations": 0},
        "trainer": {"accelerator": "cpu", "logger": False},
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "compare.yaml"


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    return write_experiment(tmp_path)


def read(folder: Path, name: str) -> dict:
    found: dict = json.loads((folder / name).read_text())
    return found


@pytest.mark.slow
def test_what_runs_share_changes_no_number(experiment: Path, tmp_path: Path) -> None:
    """Shared model, shared tokens, shared dense perplexity and reused scores give what single runs give."""
    folders, failures = run_experiment(read_settings(experiment))
    assert not failures
    assert [(folder.parent.name, folder.name) for folder in folders] == [
        (label, f"version_{index}") for label in CLASSES for index in range(2)
    ]
    metrics = [read(folder, "metrics.json") for folder in folders]
    assert sum(one["seconds"].get("evaluate dense", 0) > 0 for one in metrics) == 1
    assert sum(one["seconds"].get("calibrate", 0) > 0 for one in metrics) == 3  # every system with data, at one ratio
    assert len({one["perplexity"]["test.npy"]["dense"] for one in metrics}) == 1
    for label in ("hgsp", "shortgpt"):
        (single,), _ = run_experiment(read_settings(experiment, tmp_path / "single", ratios=[0.4], systems=[label]))
        at_04 = next(folder for folder in folders if folder.parent.name == label and folder.name == "version_1")
        one, other = read(single, "metrics.json"), read(at_04, "metrics.json")
        assert (one["method"]["scores_reused"], other["method"]["scores_reused"]) == (False, True)
        for name in ("perplexity", "configuration_sha256"):
            assert one[name] == other[name]
        for name in ("scores.csv", "plan.json", "pruned/model.safetensors"):
            assert (single / name).read_bytes() == (at_04 / name).read_bytes()


def test_only_what_is_missing_is_made_whichever_command_made_the_rest(
    experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    settings = read_settings(experiment, systems=["magnitude", "wanda"], ratios=[0.2])
    (experiment.parent / "fit.yaml").write_text(yaml.safe_dump(settings.configuration("wanda", 0.2)))
    assert fit(["--config", str(experiment.parent / "fit.yaml")]) == 0
    dead = settings.root / "wanda" / "version_7"  # what a killed process leaves
    dead.mkdir()
    (dead / "unfinished").touch()
    capsys.readouterr()
    first, _ = run_experiment(settings)
    shown = capsys.readouterr()
    assert "2 runs below" in shown.out
    assert "1 finished, 1 to make" in shown.out
    lines = shown.err.splitlines()
    assert sum(re.fullmatch(r"magnitude 0\.2: \d+\.\d s", line) is not None for line in lines) == 1
    assert any(line.startswith("magnitude 0.2 (") for line in lines)
    assert not [line for line in lines if not line.startswith("magnitude 0.2")]
    assert not dead.exists()
    stamps = [(folder / "metrics.json").stat().st_mtime_ns for folder in first]
    # Another calibration set makes new runs, but for magnitude, which reads no data.
    other = {"data.dataset": str(experiment.parent / "second.npy")}
    both = read_settings(experiment, systems=["magnitude", "wanda"], ratios=[0.2], options=other)
    second, _ = run_experiment(both)
    assert (second[0], second[1].name) == (first[0], "version_1")
    capsys.readouterr()
    assert run_experiment(both) == (second, [])
    assert capsys.readouterr().err == ""  # nothing was left to do
    assert [(folder / "metrics.json").stat().st_mtime_ns for folder in first] == stamps


def test_a_seed_makes_a_run_only_where_samples_are_drawn(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{2 + (7 * i * i + i) % 90}" for i in range(3000)))
    text = {"data.dataset": str(tmp_path / "text.txt"), "data.num_samples": "16", "data.seq_len": "16"}
    for options, expected in (({}, ["magnitude", "wanda"]), (text, ["magnitude", "wanda", "wanda"])):
        planned = plan_runs(read_settings(experiment, None, None, [0.2], ["magnitude", "wanda"], options, [0, 1]))
        assert [run.label for run in planned] == expected
        assert len({run.sha256 for run in planned}) == len(expected)


def test_run_that_fails_is_reported_and_the_others_go_on(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # One layer of six is 13 %: ShortGPT cannot remove 3 %, and says so while the other systems are made.
    options = ["--ratios", "0.03", "--systems", "shortgpt", "magnitude"]
    assert compare(["--config", str(experiment), *options]) == 1
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert "Failed runs" in shown.out
    with (tmp_path / "logs/comparison/version_0/results.csv").open(encoding="utf-8", newline="") as file:
        failed, finished = sorted(csv.DictReader(file), key=lambda row: row["status"])
    assert (failed["status"], failed["system"], failed["requested_ratio"]) == ("failed", "shortgpt", "0.03")
    assert "--model.pruning_ratio: 0.03" in failed["message"]
    assert finished["status"] == "finished"
    assert not list((tmp_path / "logs").glob("**/unfinished"))


def test_mistake_is_found_before_anything_runs(experiment: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"system 'magnitude': .*seeed"):
        run_experiment(read_settings(experiment, options={"data.seeed": "1"}))
    assert not list((tmp_path / "logs").glob("*/version_*"))


def test_two_experiments_do_not_share_a_root(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read_settings(experiment)
    monkeypatch.setattr("lightning_prune.runs.experiment.plan_runs", lambda _: run_experiment(settings))
    with pytest.raises(UserError, match="another 'lightning-prune compare' is running"):
        run_experiment(settings)


@pytest.mark.slow
def test_targets_take_the_place_of_ratios_and_share_what_was_measured(experiment: Path) -> None:
    model = make_tiny(layers=6)
    dense, config = sum(one.numel() for one in model.parameters()), model.config
    cache = 2 * 6 * config.num_key_value_heads * config.head_dim * config.max_position_embeddings
    memory = f"{4 * (dense + cache) * 3 // 4000}KB"
    settings = read_settings(experiment, systems=["wanda", "magnitude"], targets=[memory, str(dense * 2 // 3)])
    folders, failures = run_experiment(settings)
    assert not failures
    runs = [load_run(folder) for folder in folders]
    assert [run.metrics.method.scores_reused for run in runs] == [False, True] * 2
    assert all(0 <= dense * 2 // 3 - run.metrics.parameters.pruned < 1500 for run in runs[1::2])
    (group,) = audit(runs).groups
    sizes = by_size(repeats(group.all))  # whatever ratio each system needs for the same memory
    assert {size: len(lines) for size, lines in sizes.items()} == {memory: 2, runs[1].size: 2}
    with pytest.raises(UserError, match=r"--targets: found 'much'"):
        read_settings(experiment, targets=["much"])


@pytest.mark.slow
def test_methods_of_experts_are_in_one_table_with_the_others_and_decide_again_as_anew(
    experiment: Path, tmp_path: Path
) -> None:
    make_moe(width=32, layers=3).save_pretrained(tmp_path / "model")
    experts = {"config": "wanda", "model": {"init_args": {"units": "expert"}}}
    systems = {"wanda": "wanda", "experts": experts, "reap": "reap", "kfac": "hgsp_kfac_refit", "shortgpt": "shortgpt"}
    content = yaml.safe_load(experiment.read_text()) | {"systems": systems}
    experiment.write_text(yaml.safe_dump(content, sort_keys=False))
    folders, failures = run_experiment(read_settings(experiment, ratios=[0.3, 0.45]))
    assert not failures
    (group,) = audit([load_run(folder) for folder in folders]).groups
    shown = results_table(repeats(group.all), group).set_index("system")["tokens per expert"]
    assert (shown[list(systems)[:-1]] == shown["reap"].iloc[0]).all()
    assert shown["shortgpt"].iloc[0] == "–"
    counts = [one for layer in load_run(folders[0]).details.experts.tokens.values() for one in layer]
    assert sum(counts) == 3 * 2 * 8 * 16  # layers, experts of a token, tokens
    assert shown["reap"].iloc[0] == f"{statistics.median(counts):.0f}, fewest {min(counts)}"
    again = [folder for folder in folders if read(folder, "metrics.json")["method"]["scores_reused"]]
    assert {folder.parent.name for folder in again} == systems.keys()
    anew, _ = run_experiment(read_settings(experiment, tmp_path / "anew", ratios=[0.45]))
    for first, second in zip(again, anew, strict=True):
        for name in ("scores.csv", "pruned/model.safetensors"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), f"{first.parent.name} {name}"
