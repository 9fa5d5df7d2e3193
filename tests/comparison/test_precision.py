"""What half precision changes, and precisions as systems of one experiment."""

from pathlib import Path

import pytest

from lightning_prune.comparison.precision import precision_rows
from lightning_prune.comparison.run import load_run
from lightning_prune.runs.settings import read_settings
from tests.comparison.fake_run import write_run


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
    found = precision_rows([load_run(folder) for folder in write])
    assert [(row["folder"], row["folder_32_true"]) for row in found] == [(write[1], write[0])]
    units = [load_run(folder).units for folder in write[:2]]
    kept = [{i for i, pruned in enumerate(table.pruned) if not pruned} for table in units]
    assert (found[0]["units"], found[0]["decided_differently"]) == (len(units[0].pruned), len(kept[0] ^ kept[1]))
    assert found[0]["jaccard_kept"] == pytest.approx(len(kept[0] & kept[1]) / len(kept[0] | kept[1]))
    assert (found[0]["perplexity"], found[0]["perplexity_32_true"]) == (12.5, 12.5)


def test_shipped_experiment_compares_three_systems_in_two_precisions() -> None:
    settings = read_settings(Path("compare_precision"))
    found = {label: settings.configuration(label, 0.2) for label in settings.systems}
    assert settings.ratios == [0.2]
    assert {label: one["trainer"]["precision"] for label, one in found.items()} == {
        **dict.fromkeys(("hgsp_taylor", "wanda", "slimgpt"), "32-true"),
        **dict.fromkeys(("hgsp_taylor_bf16", "wanda_bf16", "slimgpt_bf16"), "bf16-true"),
    }
