import json
from pathlib import Path

import pytest
import torch

from lightning_prune.runs.environment import environment, peak_memory_bytes
from lightning_prune.runs.records import Environment
from lightning_prune.runs.verdict import summary_table


def test_summary_says_what_was_pruned_and_what_that_did() -> None:
    metrics = {
        "perplexity": {"wikitext2": {"dense": 12.3456, "pruned": 15.0, "tokens": 4242}},
        "evaluation": {"wikitext2": {"split": "test", "seq_len": 128}},
        "parameters": {"dense": 1_234_567, "pruned": 987_900},
        "pruning_ratio": {"requested": 0.2, "achieved": 0.1998},
        "footprint": {
            "dense": {
                "file_bytes": 2_500_000,
                "memory_bytes": {2048: 3_000_000, 32768: 4 * 10**9},
                "flops_per_token": 10,
            },
            "pruned": {
                "file_bytes": 2_000_000,
                "memory_bytes": {2048: 2_400_000, 32768: 3 * 10**9},
                "flops_per_token": 8,
            },
        },
        "seconds": {"calibrate": 1.235, "total": 20.0},
        "peak_memory_bytes": 3 * 2**20,
    }
    table = summary_table("my wanda", metrics)
    words = ["my wanda", "1,234,567 → 987,900", "requested 0.2000, achieved 0.1998", "dense 12.346, pruned 15.000"]
    words += ["(4,242 tokens of the test split in windows of 128)", "calibrate 1.2", "3 MiB"]
    words += ["2.5 MB → 2.0 MB", "4.00 GB → 3.00 GB at 32,768 tokens", "80% of the dense model's"]
    assert [word for word in words if word not in table] == []
    metrics["perplexity"]["wikitext2"]["pruned"] = float("inf")
    metrics["pruning_ratio"]["requested"] = None
    table = summary_table("shortgpt", metrics)
    assert "pruned inf" in table
    assert "pruning ratio         achieved 0.1998" in table


def test_environment_is_enough_for_a_papers_appendix() -> None:
    found = environment("bf16-true", torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert Environment.model_validate(found, strict=True)
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (found["precision"], found["device"]) == ("bf16-true", "cpu")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_what_the_kernel_counts_in_bytes() -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    assert peak_memory_bytes() == pytest.approx(kibibytes * 1024, rel=0.05)
