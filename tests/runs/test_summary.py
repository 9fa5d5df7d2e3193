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
    assert "the next step" not in table
    metrics["pruning_ratio"] = {"requested": 0.2, "achieved": 0.15}  # of experts, which are removed in steps
    assert "achieved 0.1500, since the next step would remove more" in summary_table("reap", metrics)
    metrics["pruning_ratio"]["achieved"] = 0.1998
    metrics["perplexity"]["wikitext2"]["pruned"] = float("inf")
    metrics["pruning_ratio"]["requested"] = None
    table = summary_table("shortgpt", metrics)
    assert "pruned inf" in table
    assert "pruning ratio         achieved 0.1998" in table


def test_summary_says_what_a_target_reached_and_where_long_windows_say_little() -> None:
    metrics = {
        "perplexity": {
            name: {"dense": dense, "pruned": 30.0, "tokens": 99} for name, dense in (("a", 20.0), ("a@8", 50.0))
        },
        "evaluation": {"a": {"seq_len": 4}, "a@8": {"seq_len": 8, "long_windows_of": "a"}},
        "parameters": {"dense": 10, "pruned": 8},
        "pruning_ratio": {"requested": None, "achieved": 0.2},
        "target": {"kind": "memory", "limit": 9_400_000, "reached": 9_300_000, "context": 1024, "batch": 2},
        "seconds": {},
        "peak_memory_bytes": 1,
    }
    table = summary_table("wanda", metrics)
    assert "at most 9.4 MB, reached 9.3 MB (weights and KV cache of 2 × 1,024 tokens)" in table
    assert table.count("2.5 times worse in these longer windows") == 1
    metrics["target"] = {"kind": "active_parameters", "limit": 9, "reached": 8, "context": 1, "batch": 1}
    metrics["perplexity"]["a@8"]["dense"] = 23.9  # type: ignore[index]
    table = summary_table("wanda", metrics)
    assert "at most 9, reached 8 (active parameters)" in table
    assert "longer windows" not in table


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
