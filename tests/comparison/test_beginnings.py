"""Runs whose windows begin with the beginning-of-sequence token are not those of runs without it."""

from typing import Any

from lightning_prune.comparison.audit import CALIBRATION_FACTS
from lightning_prune.runs.records import Calibration

FACTS: dict[str, Any] = dict.fromkeys(("configuration", "revision", "text_sha256", "tokenizer_sha256", "stride"))
FACTS |= {"dataset": "demo", "split": "train", "sampling": "random", "seed": 0, "num_samples": 128, "seq_len": 128}


def test_a_run_before_the_option_reads_as_none_and_the_audit_compares_it() -> None:
    old = Calibration(**FACTS, fingerprint="a")
    new = Calibration(**FACTS, fingerprint="b", bos="every window")
    key = CALIBRATION_FACTS["calibration BOS handling"]
    assert (getattr(old, key), getattr(new, key)) == ("none", "every window")
