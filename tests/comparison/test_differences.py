from pathlib import Path

from lightning_prune.comparison.audit import Audit, audit
from lightning_prune.comparison.differences import summary
from lightning_prune.comparison.run import load_run
from tests.comparison.fake_run import write_run

OTHER = {"fingerprint": "9" * 64, "seq_len": 512, "sampling": "sliding", "stride": 256}


def of(*folders: Path) -> Audit:
    return audit([load_run(folder) for folder in folders])


def test_one_line_says_all_in_which_a_system_differs_at_whatever_ratio(tmp_path: Path) -> None:
    ratios = list(enumerate((0.2, 0.3, 0.5)))
    found = summary(
        of(
            *(write_run(tmp_path, label, ratio, version=n) for label in ("wanda", "taylor") for n, ratio in ratios),
            *(write_run(tmp_path, "short", ratio, version=n, calibration=OTHER) for n, ratio in ratios),
        )
    )
    assert found == [
        "short: calibration sampling sliding instead of random; calibration stride 256 instead of none; "
        "calibration sequence length 512 instead of 128; calibration tokens (fingerprint) 999999999999 instead of "
        "cccccccccccc in wanda, taylor"
    ]


def test_runs_are_named_where_not_all_of_a_system_differ(tmp_path: Path) -> None:
    half = {"environment": {"precision": "bf16-true"}}
    runs = [write_run(tmp_path), write_run(tmp_path, version=1, **half), write_run(tmp_path, ratio=0.3, version=2)]
    assert summary(of(*runs)) == [
        "wanda/version_1 0.2: precision bf16-true instead of 32-true in wanda/version_0 0.2, wanda 0.3"
    ]


def test_ratios_that_were_missed_share_a_line(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "short", r, r + 0.02, whole_layers=True, version=n) for n, r in enumerate((0.2, 0.5))]
    assert summary(of(write_run(tmp_path), *runs)) == [
        "achieved ratio: short 0.2200 instead of 0.2, 0.5200 instead of 0.5 (more than 0.01 apart; short: removes "
        "whole layers, one layer is 0.0100 of the model)"
    ]
