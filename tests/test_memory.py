"""How much memory there is: believable numbers, and what a layer took is given back."""

import torch

from lightning_prune.memory import anonymous_bytes, free_bytes, free_host_bytes, give_back_freed_memory

MIB = 2**20


def test_free_memory_is_part_of_the_machine() -> None:
    assert 16 * MIB < free_host_bytes() < 2**50
    assert abs(free_bytes(torch.device("cpu")) - free_host_bytes()) < 2**30


def test_anonymous_memory_counts_what_is_allocated_and_gives_back_what_is_freed() -> None:
    give_back_freed_memory()
    before = anonymous_bytes()
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    taken = anonymous_bytes() - before
    assert 60 * MIB < taken < 80 * MIB
    del block
    assert anonymous_bytes() - before < 16 * MIB


def test_blocks_of_a_few_mebibytes_do_not_stay_in_the_heap() -> None:
    """By itself glibc raises its bound to the largest block that was freed, and keeps smaller ones from then on."""
    give_back_freed_memory()
    large = torch.ones(30 * MIB, dtype=torch.uint8)
    del large
    before = anonymous_bytes()
    blocks = [torch.ones(4 * MIB, dtype=torch.uint8) for _ in range(20)]
    kept = blocks[::5]
    del blocks
    assert anonymous_bytes() - before < len(kept) * 4 * MIB + 8 * MIB
