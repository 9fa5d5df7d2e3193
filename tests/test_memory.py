"""How much memory there is: believable numbers, and what a layer took is given back."""

import torch

from lightning_prune.memory import (
    anonymous_bytes,
    free_bytes,
    free_host_bytes,
    give_back_freed_memory,
    keep_heaps_small,
    memory_in_use,
)

MIB = 2**20


def test_free_memory_is_part_of_the_machine() -> None:
    assert 16 * MIB < free_host_bytes() < 2**50
    assert abs(free_bytes(torch.device("cpu")) - free_host_bytes()) < 2**30


def test_large_blocks_go_back_when_they_are_freed() -> None:
    keep_heaps_small()
    before = anonymous_bytes()
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    taken = anonymous_bytes() - before
    assert 60 * MIB < taken < 80 * MIB
    del block
    assert anonymous_bytes() - before < 16 * MIB


def test_the_bound_for_large_blocks_does_not_move() -> None:
    """By itself glibc raises it to the largest block that was freed, and keeps smaller ones from then on."""
    keep_heaps_small()
    large = torch.ones(30 * MIB, dtype=torch.uint8)
    del large
    before = anonymous_bytes()
    blocks = [torch.ones(12 * MIB, dtype=torch.uint8) for _ in range(10)]
    kept = blocks[::5]
    del blocks
    assert anonymous_bytes() - before < len(kept) * 12 * MIB + 8 * MIB


def test_holes_in_the_heap_are_given_back() -> None:
    keep_heaps_small()
    give_back_freed_memory()
    before = anonymous_bytes()
    blocks = [torch.ones(4 * MIB, dtype=torch.uint8) for _ in range(20)]
    kept = blocks[::5]
    del blocks
    give_back_freed_memory()
    assert anonymous_bytes() - before < len(kept) * 4 * MIB + 8 * MIB


def test_memory_in_words_is_this_processs_own() -> None:
    text = memory_in_use()
    assert abs(int(text.split(" MiB")[0].replace(",", "")) * MIB - anonymous_bytes()) < 4 * MIB
    assert ("GPU" in text) == torch.cuda.is_initialized()
