"""How much memory there is: believable numbers, and what a layer took is given back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_prune.support import memory
from lightning_prune.support.devices import free_bytes, memory_in_use
from lightning_prune.support.memory import anonymous_bytes, free_host_bytes

MIB = 2**20
# What a process keeps of blocks that it freed. Each case is a fork of a fresh process: where other tests ran before,
# blocks go into holes that those left in the heap.
BLOCKS = """
import json, os, sys, torch
from lightning_prune.support.memory import anonymous_bytes, give_back_freed_memory, keep_heaps_small

MIB = 2**20
for first, size, number, every, give_back in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    keep_heaps_small()
    torch.ones(first * MIB, dtype=torch.uint8)
    before = anonymous_bytes()
    blocks = [torch.ones(size * MIB, dtype=torch.uint8) for _ in range(number)]
    full = anonymous_bytes() - before
    kept = blocks[::every]
    del blocks
    if give_back:
        give_back_freed_memory()
    print(json.dumps([full, anonymous_bytes() - before, len(kept) * size * MIB]), flush=True)
    os._exit(0)
"""
CASES = {  # MiB of a first block that is freed at once, MiB and number of the others, every how many stays
    "large blocks go back when they are freed": (1, 64, 2, 2, False),
    "also after a larger one was, to which glibc raises its bound by itself": (30, 12, 10, 5, False),
    "holes in the heap go back when they are asked for": (1, 4, 20, 5, True),
}


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


def test_freed_memory_goes_back() -> None:
    words = [sys.executable, "-c", BLOCKS, json.dumps(list(CASES.values()))]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for (name, (_, size, number, _, _)), line in zip(CASES.items(), done.stdout.splitlines(), strict=True):
        full, left, kept = json.loads(line)  # bytes while all are there, when others are freed, and of those that stay
        assert full > (number * size - 4) * MIB, name
        assert kept - 4 * MIB < left < kept + 8 * MIB, name
