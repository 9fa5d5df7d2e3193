"""What is set for the libraries before they are imported."""

import os
import subprocess
import sys

import pytest

from lightning_prune.cli import KERNEL_CACHES, main

SHAPES = """
import os, sys
from lightning_prune.cli import KERNEL_CACHES

if sys.argv[1] == "few":
    os.environ.update(KERNEL_CACHES)
import torch
from lightning_prune.support.memory import anonymous_bytes

x = torch.ones(256, 64, dtype=torch.bfloat16)
w = torch.ones(2048, 64, dtype=torch.bfloat16)
before = anonymous_bytes()
for width in range(1, 601):
    torch.nn.functional.linear(x, w[:width])
print(anonymous_bytes() - before)
"""


def grown(which: str) -> int:
    """Bytes that a process keeps after as many shapes of matrix products as a deep pruned model has."""
    clean = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES} | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", SHAPES, which]
    return int(subprocess.run(words, capture_output=True, text=True, check=True, env=clean).stdout)


def test_kernels_of_layers_that_are_done_are_forgotten() -> None:
    all_of_them = grown("all")
    if all_of_them < 20 * 2**20:
        pytest.skip("this processor compiles no kernel for a product in bf16")
    assert grown("few") < all_of_them / 3


def test_the_command_sets_what_is_not_set_already(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNEL_CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    assert main(["methods"]) == 0
    assert {name: os.environ[name] for name in KERNEL_CACHES} == KERNEL_CACHES | {"LRU_CACHE_CAPACITY": "7"}
