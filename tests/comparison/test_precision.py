"""Precisions as systems of one experiment, and what half precision changes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_prune.cli.commands.compare import main as compare
from lightning_prune.comparison.precision import pairs, table
from lightning_prune.comparison.run import load_run
from lightning_prune.runs.settings import read_settings
from tests.comparison.fake_run import write_run
from tests.tiny import make_tiny, tiny_tokenizer, tiny_tokens

HALVES = ("bf16-true", "16-true", "bf16-mixed")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wanda in every precision at two ratios: the root of its runs and its report."""
    folder = tmp_path_factory.mktemp("experiment")
    make_tiny().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for seed, name in enumerate(("calibration.npy", "test.npy")):
        np.save(folder / name, tiny_tokens(8, 16, seed=seed).numpy())
    wanda = {"class_path": "lightning_prune.methods.Wanda"}
    content = {
        "pretrained": str(folder / "model"),
        "ratios": [0.2, 0.4],
        "systems": {
            precision: {"model": wanda, "trainer": {"precision": precision}} for precision in ("32-true", *HALVES)
        },
        "data": {"dataset": str(folder / "calibration.npy"), "eval_datasets": [str(folder / "test.npy")]},
        "trainer": {"accelerator": "cpu"},
        "root": str(folder / "logs"),
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert compare(["--config", str(folder / "compare.yaml"), "--output", str(folder / "report")]) == 0
    return folder


def test_systems_differ_in_precision_and_share_nothing_across_it(experiment: Path) -> None:
    dense = set()
    for precision in ("32-true", *HALVES):
        runs = [experiment / "logs" / precision / f"version_{index}" for index in range(2)]
        metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
        assert {json.loads((run / "environment.json").read_text())["precision"] for run in runs} == {precision}
        # The first ratio calibrates and measures the dense model, the second takes over both.
        assert [bool(one["method"].get("scores_reused")) for one in metrics] == [False, True]
        assert json.loads((runs[1] / "method.json").read_text())["measured_by"] == str(runs[0])
        assert ["evaluate dense" in one["seconds"] for one in metrics] == [True, False]
        values = {one["perplexity"]["test.npy"]["dense"] for one in metrics}
        assert len(values) == 1
        dense |= values
    assert len(dense) == 4


def test_report_counts_what_is_decided_differently(experiment: Path) -> None:
    report = experiment / "report"
    with (report / "precision.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["system"], line["requested_ratio"]) for line in lines] == [
        (precision, ratio) for ratio in ("0.2", "0.4") for precision in HALVES
    ]
    for line in lines:
        half, full = (load_run(Path(line[name])) for name in ("folder", "folder_32_true"))
        kept = [{(int(r), i) for i, r in enumerate(run.units.layer) if not run.units.pruned[i]} for run in (half, full)]
        assert int(line["decided_differently"]) == len(kept[0] ^ kept[1])
        assert float(line["jaccard_kept"]) == pytest.approx(len(kept[0] & kept[1]) / len(kept[0] | kept[1]))
        assert float(line["perplexity"]) == half.perplexity("test.npy")
        assert float(line["perplexity_32_true"]) == full.perplexity("test.npy")
    assert "## Precision" in (report / "report.md").read_text()
    assert "<h2>Precision</h2>" in (report / "report.html").read_text()
    with (report / "results.csv").open(newline="") as file:
        assert {row["precision"] for row in csv.DictReader(file)} == {"32-true", *HALVES}


def test_only_runs_that_differ_in_nothing_else_are_paired(tmp_path: Path) -> None:
    half = {"environment": {"precision": "bf16-true"}}
    write = [
        write_run(tmp_path, "wanda", 0.2, seed=1),
        write_run(tmp_path, "wanda", 0.2, seed=2, version=1, **half),  # the only one with a partner
        write_run(tmp_path, "wanda", 0.3, seed=2, version=2, **half),
        write_run(tmp_path, "wanda", 0.2, seed=2, version=3, weights="9" * 64, **half),
        write_run(tmp_path, "wanda", 0.2, seed=2, version=4, calibration={"fingerprint": "8" * 64}, **half),
        write_run(tmp_path, "magnitude", 0.2, seed=2, **half),
        write_run(tmp_path, "wanda", 0.2, seed=2, version=5, **half),
    ]
    (write[-1] / "config.yaml").write_text("model: {init_args: {round_to: 8}}\n")
    found = pairs([load_run(folder) for folder in write])
    assert [(pair.run.folder, pair.full.folder) for pair in found] == [(write[1], write[0])]
    columns, rows = table(found)
    assert {len(row) for row in rows} == {len(columns)}


def test_shipped_experiment_compares_three_systems_in_two_precisions() -> None:
    settings = read_settings(Path("compare_precision"))
    found = {label: settings.configuration(label, 0.2) for label in settings.systems}
    assert settings.ratios == [0.2]
    assert {label: one["trainer"]["precision"] for label, one in found.items()} == {
        **dict.fromkeys(("hgsp_taylor", "wanda", "slimgpt"), "32-true"),
        **dict.fromkeys(("hgsp_taylor_bf16", "wanda_bf16", "slimgpt_bf16"), "bf16-true"),
    }
