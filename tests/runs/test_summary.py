import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.evaluation.perplexity import PerplexityResult
from lightning_prune.runs.environment import environment, peak_memory_bytes
from lightning_prune.runs.records import Environment
from lightning_prune.runs.summary import run_metrics, summary_table

PLAN = PruningPlan(
    "wanda", 0.2, 0.1998, {"dense": 1_234_567, "pruned": 987_900}, None, "demo", [LayerPlan(0, [0], [1])]
)


def metrics() -> dict[str, Any]:
    dense = {"wikitext2": PerplexityResult(12.3456, 4242)}
    pruned = {"wikitext2": PerplexityResult(15.0, 4242)}
    manifest = {"wikitext2": {"split": "test", "seq_len": 128}}
    return run_metrics(PLAN, dense, pruned, manifest, {"calibrate": 1.23456, "total": 20.0}, 3 * 2**20)


def test_metrics_hold_the_documented_fields() -> None:
    found = metrics()
    assert found["perplexity"] == {"wikitext2": {"dense": 12.3456, "pruned": 15.0, "tokens": 4242}}
    assert found["evaluation"]["wikitext2"] == {"split": "test", "seq_len": 128}
    assert found["parameters"] == {"dense": 1_234_567, "pruned": 987_900}
    assert found["pruning_ratio"] == {"requested": 0.2, "achieved": 0.1998}
    assert found["seconds"] == {"calibrate": 1.235, "total": 20.0}
    assert found["peak_memory_bytes"] == 3 * 2**20


def test_summary_says_what_was_requested_and_what_came_out() -> None:
    found = metrics()
    table = summary_table("my wanda", found)
    words = ["my wanda", "1,234,567 → 987,900", "requested 0.2000, achieved 0.1998", "dense 12.346, pruned 15.000"]
    words += ["(4,242 tokens of the test split in windows of 128)", "calibrate 1.2", "3 MiB"]
    assert [word for word in words if word not in table] == []
    found["perplexity"]["wikitext2"]["pruned"] = float("inf")
    found["pruning_ratio"]["requested"] = None
    table = summary_table("shortgpt", found)
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
