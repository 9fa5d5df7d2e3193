"""How much memory there is: believable numbers, and what a layer took is given back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_prune.support import memory
from lightning_prune.support.memory import anonymous_bytes, free_bytes, free_host_bytes, memory_in_use

MIB = 2**20
# What a process keeps of blocks that it freed. Each case is a process of its own: where other tests ran before, blocks
# go into holes that those left in the heap.
BLOCKS = """
import json, sys, torch
from lightning_prune.support.memory import anonymous_bytes, give_back_freed_memory, keep_heaps_small

first, size, number, every, give_back = json.loads(sys.argv[1])
MIB = 2**20
keep_heaps_small()
torch.ones(first * MIB, dtype=torch.uint8)
before = anonymous_bytes()
blocks = [torch.ones(size * MIB, dtype=torch.uint8) for _ in range(number)]
full = anonymous_bytes() - before
kept = blocks[::every]
del blocks
if give_back:
    give_back_freed_memory()
print(json.dumps({"full": full, "left": anonymous_bytes() - before, "kept": len(kept) * size * MIB}))
"""


def blocks(first: int, size: int, number: int, every: int, give_back: bool) -> dict[str, int]:
    """Bytes while all blocks are there, when those between are gone, and of those that stay."""
    words = [sys.executable, "-c", BLOCKS, json.dumps([first, size, number, every, give_back])]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_free_memory_is_part_of_the_machine() -> None:
    assert 16 * MIB < free_host_bytes() < 2**50
    assert abs(free_bytes(torch.device("cpu")) - free_host_bytes()) < 2**30
    shown = int(memory_in_use().split(" MiB")[0].replace(",", "")) * MIB
    assert abs(shown - anonymous_bytes()) < 4 * MIB


def test_the_limit_of_a_container_counts_without_its_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    for name, text in {"memory.max": f"{9 * MIB}\n", "memory.current": f"{7 * MIB}\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "memory.stat").write_text(f"anon 123\nfile {3 * MIB}\n")
    assert free_host_bytes() == 5 * MIB


@pytest.mark.parametrize(
    ("first", "size", "number", "every", "give_back"),
    [
        pytest.param(1, 64, 2, 2, False, id="large blocks go back when they are freed"),
        pytest.param(30, 12, 10, 5, False, id="also after a larger one was, to which glibc raises its bound by itself"),
        pytest.param(1, 4, 20, 5, True, id="holes in the heap go back when they are asked for"),
    ],
)
def test_freed_memory_goes_back(first: int, size: int, number: int, every: int, give_back: bool) -> None:
    found = blocks(first, size, number, every, give_back)
    assert found["full"] > (number * size - 4) * MIB
    assert found["kept"] - 4 * MIB < found["left"] < found["kept"] + 8 * MIB
